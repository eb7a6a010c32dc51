"""Rows that several local experts read, and to which each of these adds its result.

A rank gets one copy of a token for all of its experts. So a row belongs to one choice or more. The rows are copied for
the experts, and their results are added up again. Both are gathers with sums in a fixed order: nothing is added up in
an order of chance, and the work is that of the choices.

Shape suffixes: D hidden, R rows, S choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2**16
"""Elements that are computed at once on a CPU, so that they stay in its cache."""


@dataclass(frozen=True)
class RowsOfChoices:
    """Which row each choice reads.

    Attributes:
        row_S: int64 row of each choice; every row has one choice at least.
        order_S: int64 the choices sorted by row.
        start_R: [R + 1] int64 where each row's choices start in this order, and one behind the last row's.
    """

    row_S: Tensor
    order_S: Tensor
    start_R: Tensor

    @classmethod
    def of(cls, row_S: Tensor, rows: int) -> RowsOfChoices:
        key_S, order_S = torch.sort(row_S, stable=True)
        return cls(row_S, order_S, torch.searchsorted(key_S, torch.arange(rows + 1, device=row_S.device)))

    def expand(self, rows_RD: Tensor, weight_S: Tensor | None = None) -> Tensor:
        """[R, D] → [S, D]: each choice's row, times its weight where there is one."""
        return _Expand.apply(rows_RD, weight_S, self)

    def total(self, results_SD: Tensor, weight_S: Tensor | None = None) -> Tensor:
        """[S, D] → [R, D]: the sum over each row's choices, weighted where weights are given, in fp32 (fp64 for fp64
        rows) and rounded once."""
        return _Total.apply(results_SD, weight_S, self)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_S: Tensor | None, choices: RowsOfChoices) -> Tensor:
        ctx.choices = choices
        ctx.save_for_backward(rows_RD if ctx.needs_input_grad[1] else None, weight_S)
        return _copies(rows_RD, weight_S, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RD, weight_S = ctx.saved_tensors
        of_rows = _sums(grads[0], weight_S, ctx.choices) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_rows, None, None
        of_weights = torch.empty_like(weight_S)
        for part in _blocks(grads[0]):
            _dot(rows_RD.index_select(0, ctx.choices.row_S[part]), grads[0][part], of_weights[part])
        return of_rows, of_weights, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, results_SD: Tensor, weight_S: Tensor | None, choices: RowsOfChoices) -> Tensor:
        ctx.choices = choices
        ctx.save_for_backward(results_SD if ctx.needs_input_grad[1] else None, weight_S)
        return _sums(results_SD, weight_S, choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        results_SD, weight_S = ctx.saved_tensors
        of_weights = torch.empty_like(weight_S) if ctx.needs_input_grad[1] else None
        return _copies(grads[0], weight_S, ctx.choices, results_SD, of_weights), of_weights, None


def _sums(results_SD: Tensor, weight_S: Tensor | None, choices: RowsOfChoices) -> Tensor:
    rows = choices.start_R.shape[0] - 1
    if rows == 0:
        return results_SD.new_zeros(0, results_SD.shape[1])
    source_SD = results_SD
    if weight_S is not None:  # both in one dtype
        wide = torch.promote_types(results_SD.dtype, weight_S.dtype)
        source_SD, weight_S = results_SD.to(wide), weight_S.to(wide)[choices.order_S]
    total_RD: Tensor = F.embedding_bag(
        choices.order_S, source_SD, choices.start_R, mode="sum", per_sample_weights=weight_S, include_last_offset=True
    )
    return total_RD.to(results_SD.dtype)


def _copies(
    rows_RD: Tensor,
    weight_S: Tensor | None,
    choices: RowsOfChoices,
    other_SD: Tensor | None = None,
    product_S: Tensor | None = None,
) -> Tensor:
    """Each choice's row, times its weight; on the way, the product of the row with the choice's other row."""
    if weight_S is None:
        return rows_RD.index_select(0, choices.row_S)
    copies_SD = rows_RD.new_empty(choices.row_S.shape[0], rows_RD.shape[1])
    for part in _blocks(copies_SD):
        copy = torch.index_select(rows_RD, 0, choices.row_S[part], out=copies_SD[part])
        if other_SD is not None and product_S is not None:
            _dot(copy, other_SD[part], product_S[part])
        torch.mul(copy, weight_S[part].unsqueeze(1), out=copy)  # in the wider dtype, and rounded to that of the rows
    return copies_SD


def _dot(one_SD: Tensor, other_SD: Tensor, product_S: Tensor) -> None:
    """Row by row, in the wider dtype."""
    wide = torch.promote_types(one_SD.dtype, product_S.dtype)
    product_S.copy_((one_SD.to(wide) * other_SD).sum(1))


def _blocks(rows_SD: Tensor) -> list[slice]:
    """Of rows; on a GPU one of all."""
    rows, width = rows_SD.shape
    step = max(rows if rows_SD.is_cuda else _BLOCK // max(width, 1), 1)
    return [slice(first, first + step) for first in range(0, rows, step)]
