"""Where kernels are timed: a device, a precision, a clock, and random numbers to compute with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from scmoe_ds.probe.clock import ColdClock, Run
from scmoe_ds.probe.sizes import ALL, Sizes
from scmoe_ds.probe.trials import Computed, Shape, Trial
from scmoe_ds.simulate.gpu import PeakOf
from scmoe_ds.trace.recorder import Phase

Module = TypeVar("Module", bound=nn.Module)
DTYPES: dict[PeakOf, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Bench:
    """One device in one precision.

    Attributes:
        most_bytes: that one tensor may have.
    """

    clock: ColdClock
    precision: PeakOf
    most_bytes: int
    sizes: Sizes = ALL
    _numbers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.clock.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def take(self, name: str, *shape: int) -> Tensor:
        """Random numbers of a shape. Those of one name share memory, so that nothing is drawn for each trial.

        Products of zeros take less power and may run faster.
        """
        count = int(torch.Size(shape).numel())
        held = self._numbers.get(name)
        if held is None or held.numel() < count:
            held = self._numbers[name] = torch.randn(count, device=self.device, dtype=self.dtype)
        return held[:count].view(shape)

    def place(self, module: Module) -> Module:
        """Moves a module to the device, in the precision; returns it."""
        return module.to(self.device, self.dtype)

    def fits(self, *numbers: int) -> bool:
        """Whether tensors of so many numbers are small enough."""
        return max(numbers) * self.width <= self.most_bytes

    def trial(
        self,
        kind: str,
        shapes: Sequence[Shape],
        phase: Phase | None,
        prepare: Callable[[], Run],
        flops: float = 0.0,
        moved: float = 0.0,
    ) -> Trial[Computed]:
        """A kernel that is timed cold.

        Args:
            prepare: what comes before it, such as the forward pass of a backward one; not timed.
            flops, moved: as in `Computed`; bytes.
        """
        what = Computed(kind, tuple(shapes), phase, self.precision, flops, moved)
        return Trial(what, lambda: self.clock.cold(prepare()))
