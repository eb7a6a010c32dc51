"""The timeline as a figure, in the manner of the paper's figure 7."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmoe_ds.errors import imports_of
from scmoe_ds.trace.recorder import PHASES, Phase, Span
from scmoe_ds.trace.spans import LANES, Spans, check_spans, hidden_share_of_ranks, rows_of_lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_RANKS_DRAWN = 8  # beyond that a figure is too high to read; the trace and the title's share have them all

# The seven colours that Okabe and Ito chose to be told apart by colour-blind people as well.
_COLOURS = {
    "attention": "#0072B2",
    "mlp": "#56B4E9",
    "shared": "#009E73",
    "experts": "#D55E00",
    "gate, encode, decode": "#F0E442",
    "dispatch": "#E69F00",
    "combine": "#CC79A7",
    "other": "#999999",
    "wait": "#EEEEEE",
}
_KINDS = {"shared in": "shared", "shared out": "shared"} | dict.fromkeys(
    ("gate", "encode", "decode", "merge", "norm", "shortcut norm"), "gate, encode, decode"
)
"""Kinds of spans that share a colour with others."""


def draw(spans_of_ranks: Sequence[Spans], path: str | Path, title_prefix: str = "", layer: int | None = None) -> None:
    """Writes `figure` as PNG, SVG or PDF, by the path's suffix.

    Raises:
        ValueError: no rank has a span, or none of that layer; times out of order; an unknown suffix.
        OSError, ImportError: the file cannot be written; matplotlib is missing.
    """
    figure(spans_of_ranks, title_prefix, layer).savefig(path, dpi="figure")


def figure(spans_of_ranks: Sequence[Spans], title_prefix: str = "", layer: int | None = None) -> Figure:
    """One MoE layer in the manner of the paper's figure 7: for each rank its computation above its communication.

    Forward and backward have a panel each, because a layer's are far apart in a model of several. The title holds
    that layer's hidden share over all ranks, also of those beyond the first eight, which are not drawn.

    Args:
        layer: which MoE layer; by default the last one.

    Raises:
        ValueError, ImportError: as `draw`.
    """
    with imports_of("plots", "the figure of a timeline", "open the trace in ui.perfetto.dev"):
        from matplotlib.figure import Figure
    layer, shown = _of_layer(spans_of_ranks, layer)
    drawn = dict(itertools.islice(shown.items(), _MAX_RANKS_DRAWN))
    spans = list(itertools.chain(*drawn.values()))
    phases = [phase for phase in PHASES if any(span.phase == phase for span in spans)]
    limits = [_limits(span for span in spans if span.phase == phase) for phase in phases]
    # The same scale in both panels, unless one would get too narrow to read.
    widths = [max(right - left, 0.3 * sum(end - start for start, end in limits)) for left, right in limits]

    result = Figure(figsize=(11, 1.7 + 1.15 * len(drawn)), dpi=150, layout="constrained")
    panels = result.subplots(1, len(phases), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, phase, limit in zip(panels, phases, limits, strict=True):
        axes.set(title=phase, xlabel="ms since the start of the recording", xlim=limit)
        _draw_phase(axes, {rank: [span for span in drawn[rank] if span.phase == phase] for rank in drawn})
    part = f" ({len(drawn)} of {len(shown)} ranks drawn)" if len(drawn) < len(shown) else ""
    result.suptitle(f"{title_prefix}MoE layer {layer}{part} – {_shares(list(shown.values()), phases)}", fontsize=12)
    _add_legend(result, {_kind(span) for span in spans})
    result.draw_without_rendering()  # the layout, and so the size of a box, is known only then
    for axes in panels:
        _write_labels(axes)
    return result


def _of_layer(spans_of_ranks: Sequence[Spans], layer: int | None) -> tuple[int, dict[int, Spans]]:
    """The layer to show, and its spans by rank where there are any."""
    check_spans(spans_of_ranks)
    layers = sorted({span.layer for spans in spans_of_ranks for span in spans})
    chosen = layers[-1] if layer is None else layer
    if chosen not in layers:
        raise ValueError(f"layer {chosen}: there are spans of {layers} only")
    of_layer = [[span for span in spans if span.layer == chosen] for spans in spans_of_ranks]
    return chosen, {rank: spans for rank, spans in enumerate(of_layer) if spans}


def _limits(spans: Iterable[Span]) -> tuple[float, float]:
    starts, ends = zip(*((span.start_ms, span.end_ms) for span in spans), strict=True)
    margin_ms = 0.01 * (max(ends) - min(starts)) or 1.0
    return min(starts) - margin_ms, max(ends) + margin_ms


def _shares(spans_of_ranks: Sequence[Spans], phases: Sequence[Phase]) -> str:
    shares = {phase: hidden_share_of_ranks(spans_of_ranks, phase) for phase in phases}
    texts = [f"{phase} {one.share:.1%}" for phase, one in shares.items() if one.communication_ms]
    return "communication hidden, measured: " + ", ".join(texts) if texts else "no communication"


def _kind(span: Span) -> str:
    if span.lane == "wait":
        return "wait"
    return _KINDS.get(span.kind, span.kind if span.kind in _COLOURS else "other")


def _style(kind: str) -> dict[str, Any]:
    edge, hatch = ("#9A9A9A", "////") if kind == "wait" else ("#333333", None)
    return {"facecolor": _COLOURS[kind], "edgecolor": edge, "hatch": hatch, "linewidth": 0.5}


def _draw_phase(axes: Axes, spans_of_ranks: dict[int, Spans]) -> None:
    from matplotlib.patches import Rectangle

    cut = {(span.lane, span.name) for spans in spans_of_ranks.values() for span in spans if span.chunk > 0}
    ticks: dict[float, str] = {}
    for (place, (rank, spans)), lane in itertools.product(enumerate(spans_of_ranks.items()), LANES):
        top = -2.6 * place - 1.1 * LANES.index(lane)  # of a lane of height 1
        ticks[top - 0.5] = f"rank {rank}  {lane}" if lane == LANES[0] else lane
        rows = rows_of_lane(spans, lane)
        for number, row in enumerate(rows, start=1):
            size = 1 / len(rows)  # chunks in flight at once share their lane's height
            for span in row:
                name = "wait" if span.lane == "wait" else span.kind
                label = f"{name} {span.chunk}" if (span.lane, span.name) in cut else name
                corner = (span.start_ms, top - number * size)
                axes.add_patch(Rectangle(corner, span.duration_ms, size, label=label, **_style(_kind(span))))
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axes.set_ylim(min(ticks) - 0.7, 0.2)


def _add_legend(whole: Figure, kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=kind, **_style(kind)) for kind in _COLOURS if kind in kinds]
    whole.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def _write_labels(axes: Axes) -> None:
    """A label lies flat in its box, else upright, else its chunk number does, else the legend has to do."""
    for box in axes.patches:
        room, label = box.get_window_extent(), str(box.get_label())
        colour = "white" if label.startswith("attention") else "black"  # attention has the only dark box
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": colour, "in_layout": False}
        text = axes.annotate(label, (0.5, 0.5), xycoords=box, **style)
        if box.get_hatch():
            text.set_bbox({"facecolor": box.get_facecolor(), "edgecolor": "none", "pad": 0.5})
        for content, rotation in ((label, 0), (label, 90), (label.split()[-1], 0)):
            text.set(text=content, rotation=rotation)
            extent = text.get_window_extent()
            if extent.width < 0.95 * room.width and extent.height < 0.95 * room.height:
                break
        else:
            text.remove()
