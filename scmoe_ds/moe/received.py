"""Rows that arrive from other ranks, in the order in which the local experts compute them.

Shape suffixes: D hidden, L local experts, P ranks, S rows received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a host tensor to a device. From pageable memory the host would wait for all earlier work of the GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class ReceivedRows:
    """How rows that arrive from all ranks are divided among the local experts.

    Rows arrive by rank and, within a rank, by local expert. An expert computes all of its rows together.

    Attributes:
        by_expert_S: int64 permutation that brings the rows of one expert together; None if they are already.
        rows_per_expert: rows of each local expert.
    """

    by_expert_S: Tensor | None
    rows_per_expert: tuple[int, ...]

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> ReceivedRows:
        """
        Args:
            rows: [P, L] int64 on the host: how many rows each rank sends to each local expert.
            device: of the rows.
        """
        totals = tuple(rows.sum(0).tolist())
        if rows.shape[0] == 1 or rows.shape[1] == 1:
            return cls(None, totals)
        local_expert = torch.arange(rows.shape[1]).repeat(rows.shape[0])
        order = torch.sort(local_expert.repeat_interleave(rows.flatten()), stable=True).indices
        return cls(to_device(order, device), totals)

    def group(self, rows_SD: Tensor) -> Tensor:
        """Arrival order → expert order."""
        return rows_SD if self.by_expert_S is None else rows_SD.index_select(0, self.by_expert_S)

    def ungroup(self, rows_SD: Tensor) -> Tensor:
        """Expert order → arrival order."""
        if self.by_expert_S is None:
            return rows_SD
        inverse = torch.empty_like(self.by_expert_S)
        inverse[self.by_expert_S] = torch.arange(inverse.numel(), device=inverse.device)
        return rows_SD.index_select(0, inverse)
