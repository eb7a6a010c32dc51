"""A simulated step in time, on the lanes it runs on: text for a terminal, numbers for a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scmoe_ds.planner.lanes import LaneName, LaneSpan, Phase
from scmoe_ds.simulate.step import Step

_TRANSFERS = ("communication", "reduction")
_LANES: tuple[LaneName, ...] = ("compute", "communication", "reduction")
_PHASES: tuple[Phase, ...] = ("forward", "backward")


def timeline_lines(step: Step, columns: int = 110) -> list[str]:
    """One pair of each kind, forward and backward, and the end of the step, of the ranks that compute most.

    Args:
        step: with spans.
        columns: of a line.
    """
    total, before, lines = sum(pair.count for pair in step.pairs), 0, list[str]()
    shown = [span for span in step.spans if span.lane in _TRANSFERS or span.rank_class == step.busiest]
    for pair in step.pairs:
        number = before + pair.count // 2
        before += pair.count
        others = f", like {pair.count - 1} others" if pair.count > 1 else ""
        lines.append(f"pair {number + 1} of {total}{others}")
        of_pair = [span for span in shown if span.label == number and span.lane != "reduction"]
        for phase in _PHASES:
            lines += _panel(shown, phase, [span for span in of_pair if span.phase == phase], columns)
    last_ms = max((span.end_ms for span in shown if span.label >= 0 and span.lane == "compute"), default=0.0)
    ending = [span for span in shown if span.label < 0 and span.start_ms >= last_ms]
    if ending:
        lines += ["behind all pairs", *_panel(shown, ending[-1].phase, ending, columns)]
    return [*lines, "[/]: computation stands still. All times are simulated."]


def _panel(shown: Sequence[LaneSpan], phase: Phase, of: Sequence[LaneSpan], columns: int) -> Iterator[str]:
    """All lanes from the first to the last of some spans."""
    if not of:
        return
    start_ms, end_ms = min(span.start_ms for span in of), max(span.end_ms for span in of)
    yield f"  {phase}, {end_ms - start_ms:.2f} ms"
    width = columns - 18
    scale = width / (end_ms - start_ms)
    for lane in _LANES:
        row = [" "] * width
        for span in shown:
            if _lane(span) == lane and span.start_ms < end_ms and span.end_ms > start_ms:
                begin, end = (round(scale * (ms - start_ms)) for ms in (span.start_ms, span.end_ms))
                row[max(0, begin) : max(0, end)] = _box(span, end - begin)[max(0, -begin) :]
        text = "".join(row[:width]).rstrip()
        if text:
            yield f"    {lane:<14}{text}"


def _lane(span: LaneSpan) -> LaneName:
    return "compute" if span.lane == "wait" else span.lane


def _box(span: LaneSpan, width: int) -> str:
    """So many characters; an operator of less than one has none."""
    if width < 3:
        return ("[]" if span.lane != "wait" else "//")[:width] if width != 1 else "|"
    if span.lane == "wait":
        return f"[{'/' * (width - 2)}]"
    return f"[{span.name[: width - 2]:-^{width - 2}}]"


def timeline(step: Step) -> list[dict[str, Any]]:
    """All spans as JSON values; "pair" counts from 0, −1 is outside of pairs; "class" is that of the ranks."""
    return [
        {
            "phase": span.phase,
            "lane": span.lane,
            "name": span.name,
            "pair": span.label,
            "class": span.rank_class,
            "start_ms": round(span.start_ms, 4),
            "end_ms": round(span.end_ms, 4),
        }
        for span in step.spans
    ]
