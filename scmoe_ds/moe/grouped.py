"""AutoEP's experts, which compute all rows in one call: [S, D] rows in expert order, and how many each expert has.

Shape suffixes: D hidden, S rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from scmoe_ds.moe.experts import OwnExperts, to_device

ALIGNMENT = 8
"""Rows by which torch's and Triton's grouped products want each expert to start on a GPU: 16 bytes of bf16, in the
products that give the weights' gradients."""


class GroupedRows(OwnExperts):
    """DeepSpeed's `GroupedExperts` for rows whose numbers the host knows.

    Args:
        experts: is called as a module, because ZeRO-3 gathers its parameters in a module's hooks.
        parts: of each expert, which the module computes by themselves.
    """

    def __init__(self, experts: Any, parts: int = 1) -> None:
        self.module, self.num_local_experts = experts, experts.num_experts * parts

    def run(
        self,
        rows_SD: Tensor,
        rows_per_expert: Sequence[int],
        compute: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `run_experts`.

        Args:
            compute: in the place of the module's call: [S, D] rows and [L] int32 how many each expert has → [S, D].
        """
        compute = compute or self.module
        padded = [-(-rows // ALIGNMENT) * ALIGNMENT for rows in rows_per_expert]
        if not (rows_SD.is_cuda and self.module.use_grouped_mm) or padded == list(rows_per_expert):
            padded = list(rows_per_expert)
        counts = to_device(torch.tensor(padded, dtype=torch.int32), rows_SD.device)
        if padded == list(rows_per_expert):
            return cast(Tensor, compute(rows_SD, counts))
        return _unpad(compute(_Pad.apply(rows_SD, list(rows_per_expert), padded), counts), rows_per_expert, padded)


class _Pad(torch.autograd.Function):
    """Zeros behind the rows of each expert."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, rows_per_expert: Sequence[int], padded: Sequence[int]) -> Tensor:
        ctx.sizes = rows_per_expert, padded
        return _pad(rows_SD, rows_per_expert, padded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _unpad(grads[0], *ctx.sizes), None, None


def _pad(rows_SD: Tensor, rows_per_expert: Sequence[int], padded: Sequence[int]) -> Tensor:
    zeros = rows_SD.new_zeros(ALIGNMENT, rows_SD.shape[1])
    parts = []
    for part, size in zip(rows_SD.split(list(rows_per_expert)), padded, strict=True):
        parts += [part, zeros[: size - len(part)]]
    return torch.cat(parts)


def _unpad(rows_SD: Tensor, rows_per_expert: Sequence[int], padded: Sequence[int]) -> Tensor:
    parts = zip(rows_SD.split(list(padded)), rows_per_expert, strict=True)
    return torch.cat([part[:rows] for part, rows in parts])
