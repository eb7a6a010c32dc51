"""Decoding gathers, forward and backward, and rounds once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scmoe_ds.moe.decode import decode

T, D = 40, 16


class NoScatter(TorchDispatchMode):
    """Fails where sums would come in an order of chance on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in ("index_add", "scatter", "index_put", "embedding_dense"))
        return func(*args, **(kwargs or {}))


def choices(K: int, dropped: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of choices in any order, choices of rows, and which choices are kept."""
    order_X = torch.randperm(K * T)
    number_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(K * T))
    kept_X = number_X < K * T - dropped
    if not padded:
        return torch.where(kept_X, number_X, 0).view(K, T), order_X[: K * T - dropped], kept_X.view(K, T)
    choice_R = torch.full((2 * (K * T - dropped) + 1,), K * T)  # every second row is empty
    choice_R[1::2] = order_X[: K * T - dropped]
    return torch.where(kept_X, 2 * number_X + 1, 0).view(K, T), choice_R, kept_X.view(K, T)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("K, dropped", [(1, 0), (1, 13), (2, 13), (3, 0), (6, 50), (2, 2 * T)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_equals_a_loop_over_choices(K: int, dropped: int, padded: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    row_KT, choice_R, kept_KT = choices(K, dropped, padded)
    weight_KT = (torch.rand(K, T) * kept_KT).requires_grad_()
    rows_RD = torch.randn(len(choice_R), D).to(dtype).requires_grad_()
    direction_TD = torch.randn(T, D).to(dtype)
    output_TD = decode(rows_RD, row_KT, choice_R, weight_KT, kept_KT, padded)
    with NoScatter():
        found = torch.autograd.grad(output_TD, (rows_RD, weight_KT), direction_TD)
    rows64, weight64 = rows_RD.detach().double().requires_grad_(), weight_KT.detach().double().requires_grad_()
    tokens = [
        sum((weight64[k, t] * rows64[row_KT[k, t]] for k in range(K) if kept_KT[k, t]), torch.zeros(D).double())
        for t in range(T)
    ]
    expected_TD = torch.stack(tokens)  # type: ignore[arg-type]
    if dropped < K * T:
        grads = torch.autograd.grad(expected_TD, (rows64, weight64), direction_TD.double())
    else:
        grads = torch.zeros_like(rows64), torch.zeros_like(weight64)
    once = torch.finfo(dtype).eps  # one rounding to the dtype of the rows
    torch.testing.assert_close(output_TD.double(), expected_TD, rtol=once, atol=1e-6)
    torch.testing.assert_close(found[0].double(), grads[0], rtol=once, atol=1e-6)
    torch.testing.assert_close((found[1] * kept_KT).double(), grads[1], rtol=1e-5, atol=1e-5)
