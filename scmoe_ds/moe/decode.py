"""The results of a token's experts, weighted and added up.

Shape suffixes: T tokens, D hidden, K top-k, R rows sent.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmoe_ds.moe.kernels import kernels_of


def decode(
    rows_RD: Tensor,
    row_of_choice_KT: Tensor,
    choice_of_row_R: Tensor,
    weight_KT: Tensor,
    kept_KT: Tensor | None = None,
    padded: bool = False,
) -> Tensor:
    """Gathers each token's expert outputs and adds them up, weighted, in fp32 (paper eq. 1).

    A row belongs to one choice at most. So gradients are gathered too: nothing is added up in an order of chance.

    Args:
        rows_RD: expert outputs, in the order in which the tokens were sent.
        row_of_choice_KT: int64 row of each choice; any row for a dropped one.
        choice_of_row_R: int64 choice k * T + t of each row; K * T of an empty one. Entries behind the last row are not
            read.
        weight_KT: fp32 gate values; 0 for a dropped choice.
        kept_KT: bool, which choices have a row; None: all. Of padded rows it need not be known.
        padded: some rows are empty.

    Returns:
        [T, D] in the dtype of `rows_RD`; zeros for a token whose choices were all dropped.
    """
    restore = kernels_of(rows_RD).restore
    if restore is None or padded or min(rows_RD.shape[0], weight_KT.numel()) == 0:
        return _Decode.apply(rows_RD, row_of_choice_KT, choice_of_row_R, weight_KT, padded)
    row_KT = row_of_choice_KT if kept_KT is None else torch.where(kept_KT, row_of_choice_KT, -1)
    return restore(rows_RD, row_KT.t().contiguous(), weight_KT.t().contiguous())


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        row_of_choice_KT: Tensor,
        choice_of_row_R: Tensor,
        weight_KT: Tensor,
        padded: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, row_of_choice_KT, choice_of_row_R, weight_KT)
        ctx.padded = padded
        return _weighted_sum(rows_RD, row_of_choice_KT, weight_KT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
        rows_RD, row_of_choice_KT, choice_of_row_R, weight_KT = ctx.saved_tensors
        if rows_RD.shape[0] == 0 or weight_KT.numel() == 0:
            return torch.zeros_like(rows_RD), None, None, torch.zeros_like(weight_KT), None
        choice_R = choice_of_row_R[: rows_RD.shape[0]]
        weight_X = F.pad(weight_KT.flatten(), (0, 1)) if ctx.padded else weight_KT.flatten()
        grad_RD = grads[0].index_select(0, token_of(choice_R, weight_KT, ctx.padded))
        weight_R = weight_X.index_select(0, choice_R)
        grad_rows_RD = _product(grad_RD, weight_R.unsqueeze(1), rows_RD.dtype)
        dot_R = (grad_RD.to(torch.promote_types(grad_RD.dtype, weight_KT.dtype)) * rows_RD).sum(1)
        grad_weight_KT = dot_R.index_select(0, row_of_choice_KT.flatten()).view_as(weight_KT).to(weight_KT.dtype)
        return grad_rows_RD, None, None, grad_weight_KT, None


def _weighted_sum(rows_RD: Tensor, row_of_choice_KT: Tensor, weight_KT: Tensor) -> Tensor:
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(weight_KT.shape[1], rows_RD.shape[1])
    *parts, last = [
        (rows_RD.index_select(0, row_T), weight_T.unsqueeze(1))
        for row_T, weight_T in zip(row_of_choice_KT, weight_KT, strict=True)
    ]
    if not parts:
        return _product(*last, rows_RD.dtype)
    # fp32 up to here: the weights are
    return functools.reduce(torch.add, [rows * weight for rows, weight in [*parts, last]]).to(rows_RD.dtype)


def token_of(choice_R: Tensor, choices_KT: Tensor, padded: bool = False) -> Tensor:
    """The token of each choice k * T + t; any token for K * T.

    Args:
        choices_KT: a tensor of this shape.
        padded: some choices are K * T.
    """
    K, T = choices_KT.shape
    return choice_R if K == 1 and not padded else choice_R % max(T, 1)


def _product(values: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """values * weights, computed in the wider dtype of both and rounded to `dtype`: one kernel."""
    output = torch.empty_like(values, dtype=dtype)
    return torch.mul(values, weights, out=output)
