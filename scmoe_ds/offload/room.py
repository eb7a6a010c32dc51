"""An expert's record and the memory through which its sections pass."""

from __future__ import annotations

from concurrent.futures import Future, wait
from functools import partial

import torch
from torch import Tensor

from scmoe_ds.offload.pages import page_tensor, whole_pages
from scmoe_ds.offload.shape import ExpertShape

WEIGHTS, FIRST, SECOND, GRADIENT, LOW = range(5)
"""Sections: fp32 weights, both moments of Adam, and the gradient in the parameters' dtype. Weights of a lower precision
than fp32 have a section of their own."""


def sections(shape: ExpertShape, dtype: torch.dtype, kept: bool = True) -> list[int]:
    """Bytes of the sections of an expert's record, in whole pages.

    Args:
        kept: whether its optimizer states are there, too; 0 bytes otherwise.
    """
    dtypes = [torch.float32] * 3 + [dtype] + ([] if dtype == torch.float32 else [dtype])
    found = [whole_pages(shape.elements * each.itemsize) for each in dtypes]
    lacking = () if kept else (FIRST, SECOND) if dtype == torch.float32 else (WEIGHTS, FIRST, SECOND)
    return [0 if section in lacking else nbytes for section, nbytes in enumerate(found)]


class Room:
    """Memory of one worker, for one expert, and what is on its way."""

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> None:
        make = partial(page_tensor, shape.elements, device=device)
        states = page_tensor(3 * make(torch.float32).numel(), torch.float32, device)
        self.states = list(states.chunk(3))
        self.scratch = states[: 2 * self.states[0].numel()].view(torch.float64)  # while no state is here
        self.gradient = make(dtype)
        self.wide = self.gradient if dtype == torch.float32 else make(torch.float32)
        self.low = None if dtype == torch.float32 else make(dtype)
        self.moving: list[Future[None] | None] = []

    def norm(self, gradient: Tensor) -> Tensor:
        """[] fp64, as ZeRO takes it; no state is here meanwhile."""
        return torch.linalg.vector_norm(self.scratch[: gradient.numel()].copy_(gradient))

    def settle(self) -> None:
        """Waits for what has been started, for all of it even where some has failed: the next task gets this memory."""
        moving, self.moving = [each for each in self.moving if each is not None], []
        wait(moving)
        for each in moving:
            each.result()
