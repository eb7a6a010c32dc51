"""A simulated step drawn as a recorded one is: the figure of a pair, or a trace for Perfetto."""

from __future__ import annotations

from pathlib import Path

from scmoe_ds.planner.lanes import LaneSpan
from scmoe_ds.planner.times import kind_of
from scmoe_ds.simulate.step import Step
from scmoe_ds.trace.recorder import Span
from scmoe_ds.trace.timeline import write_trace
from scmoe_ds.trace.timeline_figure import draw

_NOTE = "\nSimulated. Each rank stands for all with its load."
_CUT = ("dispatch", "experts", "combine")


def save_simulated(step: Step, path: str | Path, name: str) -> None:
    """Writes the trace of all pairs (.json), or the figure of the pair in the middle (.png, .svg, .pdf).

    Every class of ranks is drawn as one rank. All-to-alls alone are communication, as in a recorded step.

    Args:
        step: with spans.
        name: of the row, for the title.

    Raises:
        ValueError: there are no pairs; an unknown suffix.
        OSError, ImportError: the file cannot be written; matplotlib is missing.
    """
    classes = 1 + max((span.rank_class for span in step.spans), default=0)
    spans_of_ranks = [recorded(step, rank_class) for rank_class in range(classes)]
    if Path(path).suffix == ".json":
        write_trace(spans_of_ranks, path)
    else:
        middle = sum(pair.count for pair in step.pairs) // 2
        draw(spans_of_ranks, path, title_prefix=f"simulated, {name}, ", layer=middle, note=_NOTE)


def recorded(step: Step, rank_class: int) -> list[Span]:
    """What a recorder on a rank of this class would have seen of the pairs; layers are pairs."""
    return [
        _recorded(span)
        for span in step.spans
        if span.label >= 0
        and (span.lane == "communication" or (span.lane in ("compute", "wait") and span.rank_class == rank_class))
        and span.name not in ("reduce", "gather")
    ]


def _recorded(span: LaneSpan) -> Span:
    kind = kind_of(span.name)
    is_chunk = kind in _CUT and kind != span.name
    return Span(
        layer=span.label,
        name=kind if is_chunk else span.name,
        kind=kind,
        lane=span.lane,  # type: ignore[arg-type]  # "reduction" is none of these
        phase=span.phase,
        chunk=int(span.name.rpartition(" ")[2]) if is_chunk else 0,
        start_ms=span.start_ms,
        end_ms=span.end_ms,
    )
