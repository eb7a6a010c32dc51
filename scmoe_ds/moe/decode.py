"""The results of a token's experts, weighted and added up.

Shape suffixes: T tokens, D hidden, K top-k, R rows sent.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
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
    if restore is None or padded or not (rows_RD.shape[0] and weight_KT.numel()):
        return _Decode.apply(rows_RD, row_of_choice_KT, choice_of_row_R, weight_KT, padded)
    row_KT = row_of_choice_KT if kept_KT is None else torch.where(kept_KT, row_of_choice_KT, -1)
    return restore(rows_RD, row_KT.t().contiguous(), weight_KT.t().contiguous())


def weigh(
    rows_RD: Tensor,
    row_of_choice_KT: Tensor,
    choice_of_row_R: Tensor,
    weight_KT: Tensor,
    kept_KT: Tensor | None = None,
) -> Tensor:
    """[R, D] each row times the weight of its choice, where the weights are applied before the experts; zero if empty.

    Args: as `decode`.
    """
    return _Weigh.apply(rows_RD, row_of_choice_KT, choice_of_row_R, weight_KT, kept_KT)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        row_of_choice_KT: Tensor,
        choice_of_row_R: Tensor,
        weight_KT: Tensor,
        kept_KT: Tensor | None,
    ) -> Tensor:
        padded_X = torch.cat([weight_KT.flatten(), weight_KT.new_zeros(1)])  # empty rows read the last
        weight_R1 = padded_X.index_select(0, choice_of_row_R).unsqueeze(1)
        ctx.save_for_backward(rows_RD if ctx.needs_input_grad[3] else None, row_of_choice_KT, weight_R1, kept_KT)
        return _product(rows_RD, weight_R1, torch.empty_like(rows_RD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, row_of_choice_KT, weight_R1, kept_KT = ctx.saved_tensors
        of_rows = _product(grads[0], weight_R1, torch.empty_like(grads[0])) if ctx.needs_input_grad[0] else None
        if rows_RD is None:
            return of_rows, None, None, None, None
        if rows_RD.shape[0] == 0:
            return of_rows, None, None, weight_R1.new_zeros(row_of_choice_KT.shape), None
        of_weights_R = (grads[0].to(torch.promote_types(grads[0].dtype, weight_R1.dtype)) * rows_RD).sum(1)
        of_weights_KT = of_weights_R.to(weight_R1.dtype).take(row_of_choice_KT)
        return of_rows, None, None, of_weights_KT if kept_KT is None else of_weights_KT * kept_KT, None


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
        ctx.rows, ctx.padded, (K, T) = rows_RD.shape, padded, weight_KT.shape
        if not (rows_RD.shape[0] and weight_KT.numel()):
            ctx.save_for_backward(rows_RD, choice_of_row_R, weight_KT)
            return rows_RD.new_zeros(T, rows_RD.shape[1])
        chosen_KTD = rows_RD.index_select(0, row_of_choice_KT.flatten()).view(K, T, -1)
        ctx.save_for_backward(chosen_KTD, choice_of_row_R, weight_KT)
        if K == 1:
            return _product(chosen_KTD[0], weight_KT[0].unsqueeze(1), torch.empty_like(chosen_KTD[0]))
        # fp32 up to the end: the weights are
        parts = (rows_TD * weight_T.unsqueeze(1) for rows_TD, weight_T in zip(chosen_KTD, weight_KT, strict=True))
        return functools.reduce(torch.add, parts).to(rows_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
        (grad_TD,), (chosen_KTD, choice_of_row_R, weight_KT) = grads, ctx.saved_tensors
        (rows, D), choices = ctx.rows, weight_KT.numel()
        if not (rows and choices):
            return grad_TD.new_zeros(rows, D), None, None, torch.zeros_like(weight_KT), None
        grad_weight_KT = None
        if ctx.needs_input_grad[3]:  # first: its products are as large as all rows
            wide = torch.promote_types(grad_TD.dtype, weight_KT.dtype)
            grad_weight_KT = (grad_TD.to(wide) * chosen_KTD).sum(2).to(weight_KT.dtype)
        grad_XD = grad_TD.new_empty(choices + 1, D)  # one for each choice; empty rows read the last
        _product(grad_TD, weight_KT.unsqueeze(2), grad_XD[:-1].view_as(chosen_KTD))
        if ctx.padded:
            grad_XD[-1].zero_()
        return grad_XD.index_select(0, choice_of_row_R[:rows]), None, None, grad_weight_KT, None


def _product(values: Tensor, weights: Tensor, output: Tensor) -> Tensor:
    """values * weights, computed in the wider dtype of both and rounded to that of `output`: one kernel."""
    return torch.mul(values, weights, out=output)
