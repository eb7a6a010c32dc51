"""Rows that arrive from other ranks, in the order in which the local experts compute them.

Shape suffixes: D hidden, L local experts, P ranks, S rows received, C choices, X blocks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.moe.expand import RowsOfChoices
from scmoe_ds.moe.experts import to_device
from scmoe_ds.moe.per_rank import row_numbers

Counts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ReceivedRows:
    """How rows that arrive from all ranks are divided among the local experts.

    Rows arrive by rank and, within a rank, by local expert. An expert computes all of its rows together. The host knows
    how many rows follow each other in both orders, so that blocks of rows are copied. There is no index, which the host
    would have to make and a GPU to wait for.

    Attributes:
        rows_PL: rows that each rank sends to each local expert.
        rows_per_expert: rows of each local expert.
    """

    rows_PL: Counts
    rows_per_expert: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor) -> ReceivedRows:
        """From [P, L] int64 on the host."""
        return cls(rows.tolist(), tuple(rows.sum(0).tolist()))

    def group(self, rows_SD: Tensor) -> Tensor:
        """Arrival order → expert order."""
        return _Reorder.apply(rows_SD, self.rows_PL) if self._moves else rows_SD

    def ungroup(self, rows_SD: Tensor) -> Tensor:
        """Expert order → arrival order."""
        return _Reorder.apply(rows_SD, _transposed(self.rows_PL)) if self._moves else rows_SD

    @property
    def _moves(self) -> bool:
        return len(self.rows_PL) > 1 and len(self.rows_per_expert) > 1


@dataclass(frozen=True)
class ReceivedCopies:
    """How tokens that arrive from all ranks, a row each, are divided among the choices of local experts.

    Attributes:
        choices: which two numbers of each arrive as rows do that belong to one choice; see `PerRankLayout.describe`.
        rows_P: rows that each rank sends.
    """

    choices: ReceivedRows
    rows_P: Sequence[int]

    @classmethod
    def of(cls, counts: Tensor) -> ReceivedCopies:
        """From [P, L + 1] int64 on the host: choices of each local expert, then rows."""
        return cls(ReceivedRows.of(counts[:, :-1]), counts[:, -1].tolist())

    @property
    def rows_per_expert(self) -> tuple[int, ...]:
        """Choices of each local expert."""
        return self.choices.rows_per_expert

    def choices_of(self, described_C2: Tensor) -> tuple[RowsOfChoices, Tensor]:
        """From arrival order, the row of each choice and [C] its weight, in expert order."""
        described_C2 = self.choices.group(described_C2)
        before_P = list(accumulate(self.rows_P, initial=0))[:-1]  # numbers count from a rank's first row
        blocks_LP = _transposed(self.choices.rows_PL)
        places = torch.tensor([before_P * len(blocks_LP), [rows for rows_P in blocks_LP for rows in rows_P]])
        first_X, choices_X = to_device(places, described_C2.device)
        first_C = first_X.repeat_interleave(choices_X, output_size=described_C2.shape[0])
        row_C = row_numbers(described_C2) + first_C
        return RowsOfChoices.of(row_C, sum(self.rows_P)), described_C2[:, 1].contiguous()


class _Reorder(torch.autograd.Function):
    """Rows by A and within it by B → by B and within it by A; backward the other way round."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, rows_AB: Counts) -> Tensor:
        ctx.rows_AB = rows_AB
        return _reorder(rows_SD, rows_AB)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reorder(grads[0], _transposed(ctx.rows_AB)), None


def _reorder(rows_SD: Tensor, rows_AB: Counts) -> Tensor:
    blocks, stride = rows_SD.split([rows for rows_B in rows_AB for rows in rows_B]), len(rows_AB[0])
    return torch.cat([block for b in range(stride) for block in blocks[b::stride]])


def _transposed(rows_AB: Counts) -> Counts:
    return list(zip(*rows_AB, strict=True))
