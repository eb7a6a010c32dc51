"""At which rate of the links ScMoE stops to pay, and from which on no overlap does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scmoe_ds.simulate.cluster import Between, Inside
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.search import Run, run

Links = Literal["network", "inside"]
PAYS = 1.03
"""A gain by less pays for nothing: planning by calibrated times has been off by as much (benchmarks/results)."""
_STEP = 4.0
_FACTORS = tuple(_STEP**power for power in range(-3, 4))
_COMPARED = 2
"""Methods of each sort, the fastest at the rate as it is: at another rate the second may be the first."""


@dataclass(frozen=True)
class BreakEven:
    """Where the gains end, as factors on the rate of the cluster's links.

    Attributes:
        links: between nodes, or inside them.
        rate: of one NIC or one GPU's links, one direction, bytes per second; as it is.
        scmoe: factor up to which ScMoE beats the methods without a shortcut by `PAYS`; 0: at none, inf: without end.
        scmoe_from: from which on, without a gap; 0: at the slowest links, too.
        overlap: up to which any overlap beats the methods without by as much.
        best, gain: factor at which ScMoE gains most, of those as good the nearest to 1, and how much.
    """

    links: Links
    rate: float
    scmoe: float
    scmoe_from: float
    overlap: float
    best: float
    gain: float


def break_even(model: Model, runs: Sequence[Run], machine: Machine, routing: Routing, links: Links) -> BreakEven | None:
    """Searches with the layouts as they are. None: the cluster has no such links, or there is no ScMoE to compare."""
    by_time = sorted(runs, key=lambda each: each.step.total_ms)
    shortcut = [each for each in by_time if each.method.architecture == "scmoe"][:_COMPARED]
    others = [each for each in by_time if each.method.architecture != "scmoe" and each.method.overlap][:_COMPARED]
    blocking = [each for each in by_time if not each.method.overlap][:_COMPARED]
    between = machine.cluster.between
    if not shortcut or not (others or blocking) or (links == "network" and between is None):
        return None

    @functools.cache
    def times_ms(factor: float) -> tuple[float, float, float]:
        """Of the fastest with a shortcut, with other overlap, and without overlap."""
        at = with_links(machine, links, factor)
        return tuple(  # type: ignore[return-value]
            min((run(model, each.method, each.layout, at, routing).step.total_ms for each in of), default=math.inf)
            for of in (shortcut, others, blocking)
        )

    def scmoe_gain(factor: float) -> float:
        ours, *theirs = times_ms(factor)
        return min(theirs) / ours

    def overlap_gain(factor: float) -> float:
        ours, overlapped, blocked = times_ms(factor)
        return blocked / min(ours, overlapped)

    gains = {factor: scmoe_gain(factor) for factor in _FACTORS}
    most = max(gains.values())
    best = min((factor for factor in gains if gains[factor] >= most - 0.005), key=lambda factor: abs(math.log(factor)))
    rate = between.nic_rate if links == "network" and between is not None else machine.cluster.inside.rate
    overlap = _last(overlap_gain, {factor: overlap_gain(factor) for factor in _FACTORS}) if blocking else math.inf
    pays_from, pays_to = around(best, scmoe_gain, gains)
    return BreakEven(links, rate, pays_to, pays_from, overlap, best, gains[best])


def around(best: float, gain: Callable[[float], float], known: dict[float, float]) -> tuple[float, float]:
    """From which to which factor something pays without a gap, among them the best; 0: from the least, inf: to no end.

    Both are 0 where it pays at none. With layouts as they are, gradients that wait can be what hides the gain at slow
    links, and rising rates bring it out.
    """
    if known[best] < PAYS:
        return 0.0, 0.0
    below = max((factor for factor, each in known.items() if factor < best and each < PAYS), default=0.0)
    above = min((factor for factor, each in known.items() if factor > best and each < PAYS), default=math.inf)
    least = _edge(gain, below * _STEP, below) if below else 0.0
    return least, _edge(gain, above / _STEP, above) if above < math.inf else math.inf


def _last(gain: Callable[[float], float], known: dict[float, float]) -> float:
    """The largest factor at which something still pays, to 2 %, between known ones; 0: at none, inf: at all."""
    paying = [factor for factor, each in known.items() if each >= PAYS]
    if not paying:
        return 0.0
    if max(paying) == max(known):
        return math.inf
    return _edge(gain, max(paying), _STEP * max(paying))


def _edge(gain: Callable[[float], float], pays: float, fails: float) -> float:
    """Between two factors, to 2 %, where paying ends."""
    while max(pays, fails) / min(pays, fails) > 1.02:
        middle = math.sqrt(pays * fails)
        pays, fails = (middle, fails) if gain(middle) >= PAYS else (pays, middle)
    return math.sqrt(pays * fails)


def with_links(machine: Machine, links: Links, factor: float) -> Machine:
    """The machine with the network, or the links inside of nodes, faster by a factor."""

    def scaled(inside: Inside, between: Between | None) -> tuple[Inside, Between | None]:
        if links == "inside":
            root = inside.root_rate and inside.root_rate * factor
            return inside.model_copy(update={"rate": inside.rate * factor, "root_rate": root}), between
        return inside, between and between.model_copy(update={"nic_rate": between.nic_rate * factor})

    inside, between = scaled(machine.cluster.inside, machine.cluster.between)
    return replace(
        machine,
        cluster=machine.cluster.model_copy(update={"inside": inside, "between": between}),
        measured={collective: scaled(*each) for collective, each in machine.measured.items()},
    )
