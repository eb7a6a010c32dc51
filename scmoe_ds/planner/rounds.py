"""Interleaved timing: all variants in every round, in rotating order, compared by ratios within a round.

Machines drift by more than the differences that are of interest. A ratio taken within a round of a second cancels most
of the drift; an A/A pair (the same variant twice) shows what is left of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from scmoe_ds.parallel.agreement import gather

Reduction = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of one value per round."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of the values of all rounds."""
        ordered = sorted(values)
        tenth = (len(ordered) - 1) / 10
        return cls(statistics.median(ordered), ordered[round(tenth)], ordered[round(9 * tenth)])

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Of the quotients within rounds."""
        return cls.of([over / under for over, under in zip(numerators, denominators, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.p10:.3f}–{self.p90:.3f})"


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    Args:
        variants: name to a function that runs one timed unit; on CUDA it is followed by a synchronisation.
        rounds: timed rounds; round r starts with variant r modulo their number.
        warm_up: untimed rounds before.
        before: called before each timed unit (a barrier, where several ranks measure together).
        clock: seconds; `time.process_time` has the processor time of all threads instead.
    """
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            _synchronize()
            started = clock()
            variants[name]()
            _synchronize()
            if number >= 0:
                times[name].append(clock() - started)
    return times


def over_ranks(values: Sequence[float], reduce: Reduction = max) -> list[float]:
    """Each value's maximum over the ranks (of times: the slowest rank's), or another reduction. Collective."""
    return [reduce(of_ranks) for of_ranks in zip(*gather(list(values)), strict=True)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
