"""What is timed, and the rounds in which all of it takes turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.rounds import Reduction, Spread
from scmoe_ds.simulate.gpu import PeakOf
from scmoe_ds.trace.recorder import Phase

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Computed:
    """A kernel of one kind.

    Attributes:
        kind, shapes: as in `simulate.gpu.Measured`. Several shapes: one call had products of all of them.
        phase: None: the kernel is the same in both.
        flops, bytes: that it counts, as in `simulate.work.Kernel`.
    """

    kind: str
    shapes: tuple[Shape, ...]
    phase: Phase | None
    precision: PeakOf | None
    flops: float
    bytes: float


@dataclass(frozen=True)
class Sent:
    """An exchange between ranks; fields as in `simulate.profile.CollectiveTimes`. "counts" is that of row counts."""

    collective: str
    method: str
    ranks: int
    nodes: int
    bytes: int


@dataclass(frozen=True)
class Beside:
    """Computation beside an all-to-all. Its trials give no milliseconds; see `beside.py`."""

    method: str
    ranks: int
    nodes: int
    bytes: int


@dataclass(frozen=True)
class Launch:
    """What one small kernel costs the host, with autograd."""

    phase: Phase


@dataclass(frozen=True)
class Copy:
    """A copy within the device's memory."""

    bytes: int


What = TypeVar("What", Computed, Sent, Beside, Launch, Copy)


@dataclass(frozen=True)
class Trial(Generic[What]):
    """Something that is timed.

    Attributes:
        what: it is.
        sample: times it once: milliseconds on this rank. All ranks call it together; it may communicate.
        reduce: from the samples of all ranks to one; of computation the slowest rank's.
        pieces: that one sample times; each may take as long as another trial.
    """

    what: What
    sample: Callable[[], float]
    reduce: Reduction = max
    pieces: int = 1


Ladder = Sequence[Trial[Any]]
"""Trials of which each takes some times as long as the one before it."""
_STEP = 4
"""How many times."""


def climb(ladders: Iterable[Ladder], longest_ms: float) -> list[Trial[Any]]:
    """The trials that take no longer than that; of each ladder at least the first. Every one of them has run once.

    The same on every rank. Collective.
    """
    found: list[Trial[Any]] = []
    for ladder in ladders:
        for number, trial in enumerate(ladder):
            took_ms = _took_ms(trial)
            if took_ms > longest_ms / _STEP:  # or the machine was busy, or this was a first use
                took_ms = min(took_ms, _took_ms(trial))
            if number == 0 or took_ms <= longest_ms:
                found.append(trial)
            if took_ms > longest_ms / _STEP:
                break
    return found


def _took_ms(trial: Trial[Any]) -> float:
    """Of a whole sample with its preparation, on the slowest rank; of one of its pieces."""
    started = time.perf_counter()
    trial.sample()
    return max(gather(1e3 * (time.perf_counter() - started))) / trial.pieces


def in_turns(trials: Sequence[Trial[Any]], seconds: float, rounds: tuple[int, int]) -> Mapping[Any, list[float]]:
    """One sample of every trial in each round, of all ranks; rounds start with another trial each. Collective.

    Args:
        seconds: that all rounds together may take.
        rounds: fewest and most.
    """
    samples: dict[Any, list[float]] = {trial.what: [] for trial in trials}
    started = time.perf_counter()
    for number in range(rounds[1]):
        shift = number * len(trials) // rounds[1]
        mine = {trial.what: trial.sample() for trial in [*trials[shift:], *trials[:shift]]}
        ranks = gather((time.perf_counter() - started, [mine[trial.what] for trial in trials]))
        for place, trial in enumerate(trials):
            samples[trial.what].append(trial.reduce([values[place] for _, values in ranks]))
        spent = max(since for since, _ in ranks)
        if number + 1 >= rounds[0] and spent * (number + 2) / (number + 1) > seconds:
            break
    return samples


def spreads(samples: Mapping[Any, Sequence[float]]) -> dict[Any, Spread]:
    """Median, 10th and 90th percentile of each."""
    return {what: Spread.of(values) for what, values in samples.items()}
