"""From the samples of all trials to a profile."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from scmoe_ds.planner.rounds import Spread
from scmoe_ds.probe.beside import factor_of
from scmoe_ds.probe.trials import Beside, Computed, Copy, Launch, Sent
from scmoe_ds.simulate.gpu import Measured, PeakOf
from scmoe_ds.simulate.profile import CollectiveTimes, Profile, Slowdown, slowed_by

MARGIN = 0.1
"""A method of the all-to-all other than the collective has to win by so much: as in training."""
_TICK_MS = 5e-4
"""What an event of CUDA resolves: no time is shorter."""
BY_FLOPS = ("product", "grouped product", "attention")


def profile_of(samples: Mapping[Any, Sequence[float]], **machine: Any) -> Profile:
    """A profile.

    Args:
        samples: milliseconds of every round, by what was measured; of a `Beside` shares.
        machine: fields of `Profile` that say which one it is.
    """
    found = {what: Spread.of(values) for what, values in samples.items()}
    computed = {what: spread for what, spread in found.items() if isinstance(what, Computed)}
    copied = max((what for what in found if isinstance(what, Copy)), key=lambda what: what.bytes)
    bandwidth = 2 * copied.bytes / (1e-3 * found[copied].median)
    peak = _peaks(computed)
    used, others = _by_method(_curves({what: spread for what, spread in found.items() if isinstance(what, Sent)}))
    slowdowns = _slowdowns({what: spread for what, spread in found.items() if isinstance(what, Beside)})
    method = next((each.method for each in reversed(used) if each.method), "")
    counts = [1e-3 * spread.median for what, spread in found.items() if isinstance(what, Sent) and _counts(what)]
    return Profile(
        date=date.today().isoformat(),
        peak=peak,
        bandwidth=bandwidth,
        launch=1e-3 * statistics.mean(spread.median for what, spread in found.items() if isinstance(what, Launch)),
        table=tuple(each for what in computed for each in _measured(what, computed[what], peak, bandwidth)),
        spread=min(0.99, statistics.median(map(_relative, computed.values()))),
        collectives=tuple(used),
        other_methods=tuple(others),
        counts=counts[-1] if counts else None,  # of the widest group
        slowed_by=slowed_by(slowdowns, method),
        slowdowns=slowdowns,
        **machine,
    )


def _relative(spread: Spread) -> float:
    """Half of what lies between the 10th and the 90th percentile, of the median."""
    return min(0.99, (spread.p90 - spread.p10) / (2 * max(spread.median, _TICK_MS)))


def _peaks(computed: Mapping[Computed, Spread]) -> dict[PeakOf, float]:
    """FLOP/s of the fastest product in each precision."""
    found: dict[PeakOf, float] = {}
    for what, spread in computed.items():
        if what.kind == "product" and what.precision is not None:
            rate = what.flops / (1e-3 * max(spread.median, _TICK_MS))
            found[what.precision] = max(rate, found.get(what.precision, 0.0))
    return found


def _measured(what: Computed, spread: Spread, peak: Mapping[PeakOf, float], bandwidth: float) -> list[Measured]:
    assert what.precision is not None
    ms = max(spread.median, _TICK_MS)
    best = what.flops / peak[what.precision] if what.kind in BY_FLOPS else what.bytes / bandwidth
    return [
        Measured(
            kind=what.kind,
            shape=shape,
            share=1e3 * best / ms,
            phase=what.phase,
            precision=what.precision,
            ms=ms,
            spread=_relative(spread),
        )
        for shape in what.shapes
    ]


def _counts(what: Sent) -> bool:
    return what.collective == "counts"


def _curves(sent: Mapping[Sent, Spread]) -> list[CollectiveTimes]:
    curves: dict[tuple[Any, ...], list[tuple[int, Spread]]] = defaultdict(list)
    for what, spread in sent.items():
        if not _counts(what):
            curves[what.collective, what.method, what.ranks, what.nodes].append((what.bytes, spread))
    for points in curves.values():
        points.sort(key=lambda point: point[0])
    return [
        CollectiveTimes(
            collective=collective,
            method=method,
            ranks=ranks,
            nodes=nodes,
            ms=tuple((size, max(spread.median, _TICK_MS)) for size, spread in points),
            # Of large messages: what a short one takes varies with the host, and a step has no use for most of them.
            spread=statistics.median(_relative(spread) for _, spread in points[len(points) // 2 :]),
        )
        for (collective, method, ranks, nodes), points in curves.items()
    ]


def _by_method(curves: Sequence[CollectiveTimes]) -> tuple[list[CollectiveTimes], list[CollectiveTimes]]:
    """The collectives with the all-to-alls that training would choose, and those that it would not."""
    collective = {(each.ranks, each.nodes): each for each in curves if each.method == "collective"}
    used, others = list[CollectiveTimes](), list[CollectiveTimes]()
    for each in curves:
        if each.collective == "all-to-all":
            theirs = collective[each.ranks, each.nodes].ms
            ours = next(other for other in curves if other.method == "send_receive" and _same(other, each)).ms
            size = min(theirs[-1][0], ours[-1][0])
            wins = dict(theirs)[size] > (1 + MARGIN) * dict(ours)[size]
            (used if (each.method == "send_receive") == wins else others).append(each)
        else:
            used.append(each)
    return used, others


def _same(one: CollectiveTimes, other: CollectiveTimes) -> bool:
    return (one.ranks, one.nodes) == (other.ranks, other.nodes)


def _slowdowns(found: Mapping[Beside, Spread]) -> tuple[Slowdown, ...]:
    return tuple(
        Slowdown(
            method=what.method,
            ranks=what.ranks,
            nodes=what.nodes,
            bytes=what.bytes,
            factor=factor_of(spread.median),
            spread=_relative(Spread(*map(factor_of, (spread.median, spread.p10, spread.p90)))),
        )
        for what, spread in found.items()
    )
