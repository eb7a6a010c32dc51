"""An expert's parameters in one flat buffer: matrices first, then vectors, as Megatron's two groups decay them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

MATRICES, VECTORS = 0, 1
"""Numbers of the groups."""


class Part(NamedTuple):
    """A parameter: its name within the expert, shape, group, and first element in the buffer."""

    name: str
    shape: torch.Size
    group: int
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class ExpertShape:
    """Of every expert of a model.

    Attributes:
        parts: in the order of the buffer.
    """

    parts: Sequence[Part]

    @classmethod
    def of(cls, expert: nn.Module) -> ExpertShape:
        """The shape of a module; its parameters may be on the meta device."""
        named = [
            (name, each.shape, VECTORS if each.ndim <= 1 else MATRICES) for name, each in expert.named_parameters()
        ]
        parts, start = [], 0
        for name, shape, group in sorted(named, key=lambda each: each[2]):
            parts.append(Part(name, shape, group, start))
            start = parts[-1].end
        return cls(tuple(parts))

    @property
    def elements(self) -> int:
        """Of the buffer."""
        return self.parts[-1].end

    @property
    def groups(self) -> dict[int, slice]:
        """The elements of each group that has any."""
        found: dict[int, slice] = {}
        for part in self.parts:
            found[part.group] = slice(found.get(part.group, slice(part.start, 0)).start, part.end)
        return found

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters in a buffer."""
        return {part.name: flat[part.start : part.end].view(part.shape) for part in self.parts}

    def put(self, flat: Tensor, values: Mapping[str, Tensor]) -> None:
        """Copies all parameters into a buffer."""
        for name, view in self.views(flat).items():
            view.copy_(values[name])
