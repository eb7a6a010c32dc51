"""Pinned host memory, from which a GPU copies by itself while its kernels and the host go on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError, one_line
from scmoe_ds.offload.pages import page_aligned

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


def pinned_pages(nbytes: int, purpose: str) -> Tensor:
    """[nbytes] uint8 in pinned memory from the start of a page, for what is on its way between a file and a GPU.

    Args:
        purpose: of `pinned`.

    Raises:
        ArgumentError: as `pinned`.
    """
    return page_aligned(nbytes, lambda more: pinned(more, purpose, "keep fewer other things in pinned memory"))


class PinnedTensors:
    """Tensors in pinned memory.

    torch rounds each piece of pinned memory up to a power of two: an expert's 768 × 3072 weights in bf16 would take
    8 MiB rather than 4.5. So tensors share large blocks.

    Args:
        sizes: bytes of each tensor, at most.
        setting: that asks for them, for the error.
        remedy: of `pinned`.
    """

    def __init__(self, sizes: Iterable[int], setting: str, remedy: str) -> None:
        self._left = sum(map(_whole_lines, sizes))
        self._purpose, self._remedy = f"{setting} = {self._left / 1e9:.2f} GB", remedy
        self._room = torch.empty(0, dtype=torch.uint8)

    def keep(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor in a dtype.

        Raises:
            ArgumentError: as `pinned`.
        """
        nbytes = value.numel() * dtype.itemsize
        needed = _whole_lines(nbytes)
        if self._room.numel() < needed:
            self._room = pinned(max(needed, min(self._left, BLOCK_BYTES)), self._purpose, self._remedy)
        taken, self._room = self._room[:nbytes], self._room[needed:]
        self._left -= needed
        return taken.view(dtype).view(value.shape).copy_(value)


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // _LINE_BYTES) * _LINE_BYTES
