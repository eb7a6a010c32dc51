"""Links as a profile found them: latency, rate and shares by size with which a collective takes the measured times.

The collectives' own model is turned round. With a constant share s of a link's rate a collective takes a + X / s; two
evaluations give a and X, and the measured time gives s. The same links then serve groups of other sizes and more nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from scmoe_ds.simulate.case import Machine
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.collectives import all_to_all_ms, reduce_ms
from scmoe_ds.simulate.interconnect import Between, Curve, Inside
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.profile import Collective, CollectiveTimes, Profile
from scmoe_ds.simulate.work import Exchange

Link = TypeVar("Link", Inside, Between)
_LEAST_SHARE, _SMALL = 1e-4, 0.05
_MOST_RATE = 64.0
"""Times the described rate: what is measured beyond that is noise."""


def measured_links(cluster: Cluster, profile: Profile) -> dict[Collective, tuple[Inside, Between | None]]:
    """The cluster's links as each measured collective found them.

    Inside a node by the widest group on one node, between nodes by the group on most nodes. What was not measured of
    a collective stays as it is described.
    """
    found: dict[Collective, tuple[Inside, Between | None]] = {}
    for collective in dict.fromkeys(each.collective for each in profile.collectives):
        groups = [each for each in profile.collectives if each.collective == collective]
        inside, between = cluster.inside, cluster.between
        if near := max((each for each in groups if each.nodes == 1), key=_width, default=None):
            inside = _fitted_inside(cluster, near)
        if far := max((each for each in groups if each.nodes > 1), key=_width, default=None):
            between = _fitted_between(cluster, far, inside)
        found[collective] = inside, between
    return found


def _fitted_inside(cluster: Cluster, times: CollectiveTimes) -> Inside:
    return _fitted(cluster.inside, times, lambda link, size: _ms(cluster, times, size, link, None))


def _fitted_between(cluster: Cluster, times: CollectiveTimes, inside: Inside) -> Between | None:
    if cluster.between is None:
        return None
    return _fitted(cluster.between, times, lambda link, size: _ms(cluster, times, size, inside, link))


def _width(times: CollectiveTimes) -> tuple[int, int]:
    return times.nodes, times.ranks


def _ms(cluster: Cluster, times: CollectiveTimes, size: float, inside: Inside, between: Between | None) -> float:
    """What the model says that the measured group needs for a size."""
    nodes = {"nodes": times.nodes, "gpus_per_node": times.ranks // times.nodes, "inside": inside, "between": between}
    machine = Machine(cluster.model_copy(update=nodes))
    layout = Layout(times.ranks, expert_parallel=times.ranks)
    if times.collective == "all-to-all":
        exchange = Exchange(rows=size, choices=1, row_bytes=1.0, padded=True)
        return all_to_all_ms(exchange, layout, machine, times.ranks)[0]
    return reduce_ms(times.collective, size, "dp", layout, machine)[0]


def _fitted(link: Link, times: CollectiveTimes, ms: Callable[[Link, float], float]) -> Link:
    """A link with which `ms` gives the measured times."""
    size, measured = times.ms[-1]
    share = _share(link, size, measured, ms, latency=0.0) or 1.0
    link, share = _faster(link, min(_MOST_RATE, max(1.0, share))), min(1.0, share)
    size, measured = min(times.ms, key=lambda point: point[1])
    slow, slower = (ms(_changed(link, latency, share), size) for latency in (1e-2, 2e-2))  # where it is all that counts
    latency = max(0.0, 1e-2 * (1 + (measured - slow) / (slower - slow))) if slower > slow else link.latency
    shares = [(each, _share(link, each, measured, ms, latency)) for each, measured in times.ms]
    points = _rising([(_message(times, each), share) for each, share in shares if share is not None])
    if not points:
        return _changed(link, latency, 1.0)
    factor = min(_MOST_RATE, max(1.0, *(share for _, share in points)))
    curve = Curve(points=tuple((x, min(1.0, max(_LEAST_SHARE, s / factor))) for x, s in points), spread=times.spread)
    return _faster(link, factor).model_copy(update={"latency": latency, "efficiency": curve})


def _rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """No link is faster for a smaller message: what seems so is a latency that was measured too long, or a buffer."""
    bounds = accumulate((share for _, share in reversed(points)), min)
    return [(size, share) for (size, _), share in zip(reversed(points), bounds, strict=True)][::-1]


def _faster(link: Link, factor: float) -> Link:
    rates = {name: getattr(link, name, None) for name in ("rate", "root_rate", "nic_rate")}
    return link.model_copy(update={name: factor * rate for name, rate in rates.items() if rate})


def _share(
    link: Link, size: float, measured: float, ms: Callable[[Link, float], float], latency: float
) -> float | None:
    """The share of the link's rate that the measured time speaks of; None: the size is too small to tell."""
    whole, half = (ms(_changed(link, latency, share), size) for share in (1.0, 0.5))
    transfer, fixed = half - whole, 2 * whole - half
    return transfer / (measured - fixed) if measured - fixed > _SMALL * measured and transfer > 0 else None


def _changed(link: Link, latency: float, share: float) -> Link:
    return link.model_copy(update={"latency": latency, "efficiency": Curve(points=((1.0, share),), spread=0.0)})


def _message(times: CollectiveTimes, size: float) -> float:
    """Where collectives.py looks a share up: an all-to-all by the message to one peer, others by the whole tensor."""
    return size / times.ranks if times.collective == "all-to-all" else size
