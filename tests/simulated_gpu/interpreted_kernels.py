"""DeepSpeed's Triton kernels and ours against plain PyTorch, in Triton's interpreter. A program: test_kernels.py starts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Masks:
    """Of Triton's interpreter, whose masks of a scalar and a block are integers in Triton 3.9: it refuses them itself."""

    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.interpreter, name)

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        return self.interpreter.load(pointers, mask.astype(np.bool_), *rest)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        return self.interpreter.store(pointers, values, mask.astype(np.bool_))


def pretend_a_gpu() -> None:
    """DeepSpeed defines its kernels where Triton has a driver for the machine. The interpreter needs none."""
    import triton.runtime.interpreter as interpreter
    from triton.backends import backends

    for backend in backends.values():
        backend.driver.is_active = staticmethod(lambda: True)
    interpreter._interpreter = Masks(interpreter._interpreter)
    torch.cuda.device = lambda _: nullcontext()  # type: ignore[assignment, misc, return-value]


def compare(
    kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Output and gradients of a kernel, within one rounding of fp64's."""
    found, exact = (
        [each.requires_grad_() for each in inputs],
        [each.detach().double().requires_grad_() for each in inputs],
    )
    output, expected = kernel(*found), plain(*exact)
    direction = torch.randn(expected.shape).to(dtype)
    grads = torch.autograd.grad(output, found, direction)
    for a, b in zip(
        (output, *grads), (expected, *torch.autograd.grad(expected, exact, direction.double())), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-5)


def compare_top1() -> None:
    """Each kernel against plain PyTorch on the same inputs, with one expert to many, and tokens of several blocks."""
    from scmoe_ds.moe.top1_triton import TRITON
    from tests.simulated_gpu.plain_top1 import PLAIN_TOP1

    def alike(name: str, *inputs: Any) -> tuple[Tensor, ...]:
        found, expected = getattr(TRITON, name)(*inputs), getattr(PLAIN_TOP1, name)(*inputs)
        found, expected = ((each,) if isinstance(each, Tensor) else each for each in (found, expected))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype
            if name == "choose" and ours.dim() == 2:  # sums over blocks, of which plain PyTorch has one
                ours, theirs = ours.sum(0), theirs.sum(0)
            torch.testing.assert_close(ours, theirs)
        return tuple(found)

    for T, E, limit, rts in ((1, 1, 1, True), (300, 3, 40, True), (700, 4, 700, False), (33, 600, 1, True)):
        logits, random = torch.randn(T, E), torch.rand(T, E) if rts else None
        expert, probability, key, sums = alike("choose", logits, random)
        key, token = torch.sort(key, stable=True)
        counts, rows, start, row_start, _ = alike("count", key, sums, limit)
        token, row, kept, _ = alike("place", key, token, start, row_start, probability, limit)
        assert int(kept.sum()) == int(rows.sum()) and torch.equal(row[token], torch.arange(T))
        alike("gradient", logits, expert, kept, counts, torch.randn(T), torch.randn(()))


def main() -> None:
    pretend_a_gpu()
    from scmoe_ds.compat import weighted_restore
    from scmoe_ds.moe.kernels import packed_swiglu, plain_swiglu

    restore, swiglu = weighted_restore(), packed_swiglu()
    assert restore is not None and swiglu is not None, "DeepSpeed has not found Triton"
    torch.manual_seed(0)
    T, D = 12, 24
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for K, dropped in ((1, 0), (1, 5), (2, 5), (3, 0)):
            number_TK = torch.randperm(K * T).view(T, K)
            kept_TK = number_TK < K * T - dropped
            row_TK = torch.where(kept_TK, number_TK, -1)
            inputs = [torch.randn(K * T - dropped, D).to(dtype), torch.rand(T, K) * kept_TK]
            compare(
                lambda rows, weights, row_TK=row_TK: restore(rows, row_TK, weights),
                lambda rows, weights, row_TK=row_TK: (
                    rows[row_TK.clamp(min=0)] * (weights * (row_TK >= 0)).unsqueeze(2)
                ).sum(1),
                inputs,
                dtype,
            )
        compare(swiglu, plain_swiglu, [torch.randn(5, 2 * D).to(dtype)], dtype)
    compare_top1()
    print("the kernels and plain PyTorch agree")


if __name__ == "__main__":
    main()
