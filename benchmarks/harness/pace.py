"""How fast the machine is while rows are measured, by kernels that `scmoe probe` times, too.

A virtual machine's speed changes within minutes, with what others compute on its host. What was measured at another
time, such as a profile, can be compared by these kernels: one sample of each in every round, in the probe's own way.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from scmoe_ds.parallel.process import device
from scmoe_ds.planner.rounds import over_ranks
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import ColdClock
from scmoe_ds.probe.passes import passes
from scmoe_ds.probe.products import products

MOST_BYTES = 64 << 20
_PRODUCTS = {("forward", (1024, 512, 2048)), ("backward", (1024, 2048, 512)), ("backward", (512, 1024, 2048))}
_PASSES = {"activation", "reduction"}
_NUMBERS = 1 << 22

Pace = Sequence[Mapping[str, Any]]
"""Milliseconds by "kind", "phase" and "shape"."""


class References:
    """The kernels, and their samples on this rank."""

    def __init__(self) -> None:
        bench = Bench(ColdClock(device()), "fp32", MOST_BYTES)
        every = [trial for ladder in chain(products(bench), passes(bench)) for trial in ladder]
        self._trials = [each for each in every if _is_reference(each.what)]
        self._samples: list[list[float]] = [[] for _ in self._trials]

    def sample(self) -> None:
        """Each of them once."""
        for trial, samples in zip(self._trials, self._samples, strict=True):
            samples.append(trial.sample())

    def pace(self) -> Pace:
        """Medians of the slower rank. Collective."""
        found = []
        for trial, samples in zip(self._trials, self._samples, strict=True):
            what = trial.what
            ms = statistics.median(over_ranks(samples))
            found.append({"kind": what.kind, "phase": what.phase, "shape": list(what.shapes[0]), "ms": ms})
        return found


def _is_reference(what: Any) -> bool:
    if what.kind == "product":
        return (what.phase, what.shapes[0]) in _PRODUCTS
    return what.kind in _PASSES and what.bytes / 4 % _NUMBERS == 0 and 2 <= what.bytes / 4 / _NUMBERS <= 3
