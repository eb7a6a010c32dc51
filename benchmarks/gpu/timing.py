"""Times of the device: nothing of a call in its caches, the host ahead, medians with their spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from scmoe_ds.planner.rounds import Spread
from scmoe_ds.probe import clock
from scmoe_ds.probe.clock import Run


class ColdClock(clock.ColdClock):
    """Times calls on one device, several times each. A rehearsal on a CPU empties no caches."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, None if device.type == "cuda" else 1 << 18)

    def milliseconds(self, calls: Sequence[Callable[[], object]], repeats: int, warm_up: int = 3) -> list[float]:
        """Of `repeats` calls, one after the other in turn.

        Args:
            calls: the same on different inputs, so that no call finds its input in a cache.
        """
        for number in range(warm_up):
            calls[number % len(calls)]()
        return [self.cold(Run(calls[number % len(calls)])) for number in range(repeats)]

    def spread(self, calls: Sequence[Callable[[], object]], repeats: int) -> Spread:
        """Median, 10th and 90th percentile in milliseconds."""
        return Spread.of(self.milliseconds(calls, repeats))


def text(spread: Spread, digits: int = 3) -> str:
    """Median (10th–90th percentile)."""
    return f"{spread.median:.{digits}f} ({spread.p10:.{digits}f}–{spread.p90:.{digits}f})"
