"""What limits a step, and which method to take: one sentence each, as sure as the numbers are."""

from __future__ import annotations

from collections.abc import Sequence

from scmoe_ds.planner.speed_text import NOTICEABLE, change, compared
from scmoe_ds.simulate.rows import Interval, Row
from scmoe_ds.simulate.search import Run, layout_text

_NAMES = {
    "compute": "products and attention at the GPU's peak",
    "memory": "the bandwidth of the GPU's memory",
    "launch": "kernel launches",
}
_LINKS = {"link": "links inside the node", "NIC": "the network", "switch": "the network's spine"}


def shares(found: Run) -> dict[str, float]:
    """What a step's time goes to, the most first; the parts sum to 1, or nearly."""
    step, parts = found.step, found.times.parts
    computed = {name: parts.get(name, 0.0) for name in _NAMES}
    # `parts` are of one micro-batch and of all transfers, hidden or not.
    factor = (step.compute_ms + step.slowed_ms) / (sum(computed.values()) or 1.0)
    links = {name: parts[name] for name in _LINKS if parts.get(name)}
    slowest = _LINKS[max(links, key=lambda name: links[name])] if links else "links"
    times = {_NAMES[name]: ms * factor for name, ms in computed.items()}
    times[f"waiting for all-to-alls over {slowest}"] = step.exposed_ms
    times["waiting for gradients and parameters of other ranks"] = step.exposed_reduce_ms
    times["the optimizer"] = step.optimizer_ms
    known = {name: ms / step.total_ms for name, ms in times.items() if ms > 0}
    return dict(sorted(known.items(), key=lambda each: -each[1]))


def limit(found: Run) -> str:
    """What limits the method's step, in one sentence."""
    (first, share), *rest = shares(found).items()
    others = ", ".join(f"{name} {100 * each:.0f} %" for name, each in rest if each >= 0.01)
    return f"{found.method.name} is limited by {first}: {100 * share:.0f} % of a step" + (
        f"; {others}" if others else ""
    )


def chosen(rows: Sequence[Row]) -> Row:
    """The fastest. Among those as fast: one without a shortcut, then Pos-2, whose models were the best in the paper."""
    fastest = min(each.step_ms.likely for each in rows)
    equal = [each for each in rows if each.step_ms.likely < NOTICEABLE * fastest]
    plain = [each for each in equal if not _has_shortcut(each)]
    if plain:
        return min(plain, key=lambda each: each.step_ms.likely)
    order = ("pos2", "pos1", "pos3")
    return min(equal, key=lambda each: (each.run.method.join, order.index(each.run.method.position or "pos1")))


def recommendation(rows: Sequence[Row]) -> str:
    """Which row to take, and how sure that is."""
    row = chosen(rows)
    take = f"take {row.name} ({layout_text(row.run.layout)})"
    rivals = [each for each in rows if _has_shortcut(each) != _has_shortcut(row)]
    if not rivals:
        return f"{take}, the fastest"
    rival = min(rivals, key=lambda each: each.step_ms.likely)
    if _has_shortcut(row):
        gain = against(row, rival)
        return f"{take}: it {_gain(gain, rival)}, the fastest without a shortcut{_doubt(gain)}"
    gain = against(rival, row)
    return f"{take}: no shortcut gains more here; {rival.name} {_gain(gain, row)}{_doubt(gain)}"


def _has_shortcut(row: Row) -> bool:
    return row.run.method.architecture == "scmoe"


def against(row: Row, other: Row) -> Interval:
    """How many times as fast a row is as another one, machine by machine."""
    return Interval.of([theirs / own for own, theirs in zip(row.steps_ms, other.steps_ms, strict=True)])


def _gain(gain: Interval, other: Row) -> str:
    return f"{compared(gain.likely, other.name)} ({gain.low:.2f} to {gain.high:.2f})"


def _doubt(gain: Interval) -> str:
    """Where the interval of a gain or a loss includes that there is none."""
    if change(gain.likely) in ("none", change(gain.low if gain.likely > 1 else gain.high)):
        return ""
    return "; that is less than what is not known of this cluster: measure both (scmoe probe, scmoe report)"
