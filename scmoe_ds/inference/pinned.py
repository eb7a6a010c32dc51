"""Pinned host memory, from which a GPU copies by itself while its kernels and the host go on."""

from __future__ import annotations

import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError, one_line

BLOCK_BYTES = 256 << 20
_LINE_BYTES = 256  # where a tensor in a block may begin


def pinned(nbytes: int, purpose: str, remedy: str) -> Tensor:
    """[nbytes] uint8 in pinned memory, not initialised.

    Args:
        purpose: for the error: the setting that needs it, and how much in all.
        remedy: for the error.

    Raises:
        ArgumentError: the system does not give as much.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, MemoryError) as error:  # of CUDA and of torch, by version
        raise ArgumentError(
            f"{purpose}: so much memory cannot be pinned ({one_line(error, 100)}); {remedy}, or raise the limits of "
            "the process (ulimit -l and -v, its container's memory)"
        ) from None


class PinnedTensors:
    """Tensors in pinned memory.

    torch rounds each piece of pinned memory up to a power of two: an expert's 768 × 3072 weights in bf16 would take
    8 MiB rather than 4.5. So tensors share large blocks.

    Args:
        nbytes: of all tensors, at most.
        setting: that asks for them, for the error.
        remedy: of `pinned`.
    """

    def __init__(self, nbytes: int, setting: str, remedy: str) -> None:
        self._purpose, self._remedy, self._left = f"{setting} = {nbytes / 1e9:.2f} GB", remedy, nbytes
        self._room = torch.empty(0, dtype=torch.uint8)

    def keep(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in a dtype.

        Raises:
            ArgumentError: as `pinned`.
        """
        needed = value.numel() * dtype.itemsize
        if self._room.numel() < needed:
            self._room = pinned(max(needed, min(self._left, BLOCK_BYTES)), self._purpose, self._remedy)
        taken, self._room = self._room[:needed], self._room[-(-needed // _LINE_BYTES) * _LINE_BYTES :]
        self._left -= needed
        return taken.view(dtype).view(value.shape).copy_(value)
