"""Times of the device: nothing of a call in its caches, the host ahead, medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness.measure import EVICTED_BYTES
from scmoe_ds.planner.rounds import Spread

_AHEAD_CYCLES = 4_000_000
"""About 2 ms of a GPU: the host launches some hundred kernels in that time."""


class ColdClock:
    """Times calls on one device.

    Before each timed call other memory is written, more than the last cache holds. On a GPU a kernel that only waits
    goes first, so that the host is ahead and the time between launches does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        evicted = EVICTED_BYTES
        if device.type == "cuda":
            evicted = max(evicted, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self._other = torch.zeros(evicted // 4 if device.type == "cuda" else 1 << 16, device=device)

    def get_cold(self) -> None:
        """Empties the caches, and lets the host get ahead."""
        self._other.add_(1)
        if self.device.type == "cuda":
            torch.cuda._sleep(_AHEAD_CYCLES)

    def milliseconds(self, calls: Sequence[Callable[[], object]], repeats: int, warm_up: int = 3) -> list[float]:
        """Of `repeats` calls, one after the other in turn.

        Args:
            calls: the same on different inputs, so that no call finds its input in a cache.
        """
        for number in range(warm_up):
            calls[number % len(calls)]()
        return [self._one(calls[number % len(calls)]) for number in range(repeats)]

    def spread(self, calls: Sequence[Callable[[], object]], repeats: int) -> Spread:
        """Median, 10th and 90th percentile in milliseconds."""
        return Spread.of(self.milliseconds(calls, repeats))

    def _one(self, call: Callable[[], object]) -> float:
        self.get_cold()
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def text(spread: Spread, digits: int = 3) -> str:
    """Median (10th–90th percentile)."""
    return f"{spread.median:.{digits}f} ({spread.p10:.{digits}f}–{spread.p90:.{digits}f})"
