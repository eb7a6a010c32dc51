"""Interleaved timing: all variants in every round, in rotating order, compared by ratios within a round.

Machines drift by more than the differences that are of interest. A ratio taken within a round of a second cancels most
of the drift; an A/A pair (the same variant twice) shows what is left of it.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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


EVICTED_BYTES = 64 << 20  # more than the last level of any cache that a core has to itself


def cold(step: Callable[[], object], other: torch.Tensor) -> Callable[[], None]:
    """The step with nothing of it in the caches, as between other pairs in a round or other layers in a model.

    Args:
        other: `EVICTED_BYTES` of anything.
    """

    def run() -> None:
        other.add_(1)
        step()

    return run


def over_ranks(values: Sequence[float], op: Any = dist.ReduceOp.MAX) -> list[float]:
    """Each value's maximum over the ranks (of times: the slowest rank's), or another reduction. Collective."""
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, op=op)
    return reduced.tolist()


def environment() -> dict[str, str]:
    """Hardware and versions, for the head of a record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_model()
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **packages,
        "commit": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
