"""Which figure of a cluster's description must be wrong, by steps that were measured.

One figure at a time is scaled, everything else stays, and the scale is searched that brings the simulated steps closest
to the measured ones. Steps of one setting alone can often be explained by more than one figure. Then the answer says
so, instead of naming one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scmoe_ds.simulate.cluster import Cluster

MOST = 32.0
"""A figure is scaled by 1/32 … 32. Nobody's description is further off than that."""
STILL = 0.01
"""Relative differences below this are noise of any measurement, unless its own spread is larger."""
_GRID, _GOLDEN_STEPS = 11, 16
_GOLDEN = (math.sqrt(5) - 1) / 2

Parts = Mapping[str, float]
"""Milliseconds of a step by name: "total", and any of "exposed", "reduce", "optimizer"."""
Simulator = Callable[[Cluster], Sequence[Parts]]
"""A description to the parts of every setting that was measured, in their order."""


class Figure(NamedTuple):
    """A number of the description.

    Attributes:
        path: as in the JSON file.
        words: what it is.
        scaled: a copy of the description with the number times a factor; None: there is no such number.
        value: the number, in base units.
        unit: of it; "": none.
        of_part: a part of the step that the factor multiplies instead; "": none.
    """

    path: str
    words: str
    scaled: Callable[[Cluster, float], Cluster | None]
    value: Callable[[Cluster], float]
    unit: str = ""
    of_part: str = ""

    def simulated(self, simulate: Simulator, cluster: Cluster, factor: float) -> tuple[Parts, ...]:
        """The steps with the figure times a factor."""
        changed = self.scaled(cluster, factor)
        assert changed is not None
        steps = tuple(simulate(changed))
        return tuple(_longer(step, self.of_part, factor) for step in steps) if self.of_part else steps


@dataclass(frozen=True)
class MeasuredStep:
    """A step of one setting, as it was measured.

    Attributes:
        name: of the setting.
        parts: as `Parts`; "total" is always there.
        spread: of the total, relative.
    """

    name: str
    parts: Parts
    spread: float = 0.0


@dataclass(frozen=True)
class Explanation:
    """A figure, and what its change explains.

    Attributes:
        factor: on the figure.
        error: root of the mean squared relative difference that remains.
        simulated: the steps with the changed figure.
    """

    figure: Figure
    factor: float
    error: float
    simulated: tuple[Parts, ...]


@dataclass(frozen=True)
class Fit:
    """What measured steps say about a description.

    Attributes:
        error: of the description as it is.
        noise: what the measurements themselves differ by.
        explanations: one per figure that changes these steps at all, the best first.
        without_effect: figures that change nothing of them.
        simulated: the steps with the description as it is.
    """

    error: float
    noise: float
    explanations: tuple[Explanation, ...]
    without_effect: tuple[Figure, ...]
    simulated: tuple[Parts, ...]

    @property
    def is_right(self) -> bool:
        """Whether the description explains the steps as it is."""
        return self.error <= self.noise

    @property
    def best(self) -> tuple[Explanation, ...]:
        """The explanations that these steps cannot tell apart; empty if none halves the error."""
        if self.is_right or not self.explanations or self.explanations[0].error > self.error / 2:
            return ()
        limit = max(self.noise, 1.25 * self.explanations[0].error)
        return tuple(each for each in self.explanations if each.error <= min(limit, self.error / 2))


def fit(measured: Sequence[MeasuredStep], simulate: Simulator, cluster: Cluster) -> Fit:
    """Tries every figure alone.

    Args:
        simulate: must give the steps in the order of `measured`, with the parts that those have.

    Raises:
        ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("no measured steps")
    as_is = tuple(simulate(cluster))
    noise = max([STILL, *(step.spread for step in measured)])
    explanations: list[Explanation] = []
    without_effect: list[Figure] = []
    for figure in FIGURES:
        if figure.scaled(cluster, 1.0) is None:
            continue
        found = _explanation(figure, measured, simulate, cluster)
        if found is None:
            without_effect.append(figure)
        else:
            explanations.append(found)
    explanations.sort(key=lambda each: each.error)
    return Fit(error_of(measured, as_is), noise, tuple(explanations), tuple(without_effect), as_is)


def error_of(measured: Sequence[MeasuredStep], simulated: Sequence[Parts]) -> float:
    """The root of the mean squared difference: of totals the logarithm of the ratio, of parts relative to the total."""
    squares = []
    for step, found in zip(measured, simulated, strict=True):
        total = step.parts["total"]
        squares.append(math.log(found["total"] / total) ** 2)
        squares += [((found[name] - ms) / total) ** 2 for name, ms in step.parts.items() if name != "total"]
    return math.sqrt(sum(squares) / len(squares))


def _explanation(
    figure: Figure, measured: Sequence[MeasuredStep], simulate: Simulator, cluster: Cluster
) -> Explanation | None:
    known: dict[float, tuple[float, tuple[Parts, ...]]] = {}

    def error(logarithm: float) -> float:
        if logarithm not in known:
            simulated = figure.simulated(simulate, cluster, math.exp(logarithm))
            known[logarithm] = error_of(measured, simulated), simulated
        return known[logarithm][0]

    best = least(error, -math.log(MOST), math.log(MOST))
    errors = [each for each, _ in known.values()]
    if max(errors) - min(errors) < STILL / 10:
        return None
    return Explanation(figure, math.exp(best), *known[best])


def _longer(step: Parts, part: str, factor: float) -> Parts:
    more = (factor - 1) * step.get(part, 0.0)
    return {**step, part: step.get(part, 0.0) + more, "total": step["total"] + more}


def least(of: Callable[[float], float], low: float, high: float) -> float:
    """Where a function is least: on a grid, then by the golden section around the grid's best point."""
    step = (high - low) / (_GRID - 1)
    around = min((low + step * place for place in range(_GRID)), key=of)
    left, right = max(low, around - step), min(high, around + step)
    tried = [around]
    for _ in range(_GOLDEN_STEPS):
        inner = (right - _GOLDEN * (right - left), left + _GOLDEN * (right - left))
        tried += inner
        left, right = (left, inner[1]) if of(inner[0]) <= of(inner[1]) else (inner[0], right)
    return min(tried, key=of)


def _of_gpu(name: str) -> Callable[[Cluster, float], Cluster]:
    def scaled(cluster: Cluster, factor: float) -> Cluster:
        return _with(cluster, "gpu", {name: getattr(cluster.gpu, name) * factor})

    return scaled


def _peak(cluster: Cluster, factor: float) -> Cluster:
    return _with(cluster, "gpu", {"peak": {name: rate * factor for name, rate in cluster.gpu.peak.items()}})


def _inside(cluster: Cluster, factor: float) -> Cluster | None:
    root = cluster.inside.root_rate
    if cluster.gpus_per_node == 1:
        return None
    changes = {"rate": cluster.inside.rate * factor, "root_rate": None if root is None else root * factor}
    return _with(cluster, "inside", changes)


def _between(name: str) -> Callable[[Cluster, float], Cluster | None]:
    def scaled(cluster: Cluster, factor: float) -> Cluster | None:
        if cluster.between is None or cluster.nodes == 1:
            return None
        return _with(cluster, "between", {name: getattr(cluster.between, name) * factor})

    return scaled


def _with(cluster: Cluster, part: str, changes: Mapping[str, object]) -> Cluster:
    """A copy with other numbers; they are not checked, because a search passes through impossible ones."""
    return cluster.model_copy(update={part: getattr(cluster, part).model_copy(update=changes)})


FIGURES = (
    Figure("gpu.peak", "efficiency of matrix products", _peak, lambda c: max(c.gpu.peak.values()), "FLOP/s"),
    Figure("gpu.bandwidth", "bandwidth of the GPU's memory", _of_gpu("bandwidth"), lambda c: c.gpu.bandwidth, "B/s"),
    Figure("gpu.launch", "cost of a kernel launch", _of_gpu("launch"), lambda c: c.gpu.launch, "s"),
    Figure("inside.rate", "link inside a node", _inside, lambda c: c.inside.rate, "B/s"),
    Figure(
        "between.nic_rate",
        "NIC",
        _between("nic_rate"),
        lambda c: math.nan if c.between is None else c.between.nic_rate,
        "B/s",
    ),
    Figure(
        "between.latency",
        "latency between nodes",
        _between("latency"),
        lambda c: math.nan if c.between is None else c.between.latency,
        "s",
    ),
    Figure(
        "optimizer",
        "time of the update over what its bytes take",
        lambda c, _: c,
        lambda _: 1.0,
        of_part="optimizer",
    ),
)
