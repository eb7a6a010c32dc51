"""The timeline as a figure, in the manner of the paper's figure 7."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmoe_ds.errors import imports_of
from scmoe_ds.figure_style import INK, OPERATORS, WIDTH, coloured_as, save, styled
from scmoe_ds.trace.recorder import PHASES, Phase, Span
from scmoe_ds.trace.spans import Hidden, Spans, check_spans, hidden_share_of_ranks, lanes_of, rows_of_lane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_RANKS_DRAWN = 8  # beyond that a figure is too high to read; the trace and the titles' shares have them all
_SHOWN = {"mlp": "MLP", "shared": "shared expert"}
"""Words for kinds of spans, in boxes and in the legend alike."""
_AXIS = "ms since the start of the phase"
_NUMBER = "; a number in a box is its chunk's"
_EXPERT = "; a number in a box is its expert's"


_GAP = "\nA gap: nothing was recorded. The process launched an operator or communication, or had not begun."


def draw(
    spans_of_ranks: Sequence[Spans],
    path: str | Path,
    title_prefix: str = "",
    layer: int | None = None,
    note: str = _GAP,
) -> None:
    """Writes `figure` as PNG, SVG or PDF, by the path's suffix.

    Args:
        note: below the axis.

    Raises:
        ValueError: no rank has a span, or none of that layer; times out of order; an unknown suffix.
        OSError, ImportError: the file cannot be written; matplotlib is missing.
    """
    save(figure(spans_of_ranks, title_prefix, layer, note=note), path)


def figure(
    spans_of_ranks: Sequence[Spans],
    title_prefix: str = "",
    layer: int | None = None,
    until_ms: float | None = None,
    note: str = _GAP,
) -> Figure:
    """One MoE layer in the manner of the paper's figure 7: for each rank its computation above its communication.

    Forward and backward have a panel each, because a layer's are far apart in a model of several. Both have the same
    scale, and start at 0. The panels' titles hold that layer's hidden share over all ranks, also of those beyond the
    first eight, which are not drawn.

    Args:
        layer: which MoE layer; by default the last one.
        until_ms: the end of the scale, for figures to compare; by default that of the longer phase.
        note: below the axis.

    Raises:
        ValueError, ImportError: as `draw`.
    """
    with imports_of("plots", "the figure of a timeline", "open the trace in ui.perfetto.dev"):
        import matplotlib.figure  # noqa: F401
    return _figure(spans_of_ranks, title_prefix, layer, until_ms, note)


@styled
def _figure(
    spans_of_ranks: Sequence[Spans], title_prefix: str, layer: int | None, until_ms: float | None, note: str
) -> Figure:
    from matplotlib.figure import Figure

    layer, shown = _of_layer(spans_of_ranks, layer)
    drawn = dict(itertools.islice(shown.items(), _MAX_RANKS_DRAWN))
    phases = {phase: parts for phase in PHASES if any((parts := _from_zero(drawn, phase)).values())}
    spans = list(itertools.chain.from_iterable(of for parts in phases.values() for of in parts.values()))
    until_ms = until_ms or max(span.end_ms for span in spans) or 1.0

    height = 0.35 + 0.3 * len(lanes_of(spans))  # of a rank
    result = Figure(figsize=(WIDTH, 1.2 + len(phases) * (0.7 + height * len(drawn))))
    panels = result.subplots(len(phases), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (phase, parts) in zip(panels, phases.items(), strict=True):
        axes.set(title=f"{phase}: {_share(list(shown.values()), phase)}", xlim=(-0.005 * until_ms, 1.005 * until_ms))
        _draw_phase(axes, parts)
    numbers = _NUMBER * any(span.chunk > 0 for span in spans) or _EXPERT * any(span.migration for span in spans)
    panels[-1].set_xlabel(_AXIS + numbers + note)
    part = f" ({len(drawn)} of {len(shown)} ranks drawn)" if len(drawn) < len(shown) else ""
    result.suptitle(f"{title_prefix}MoE layer {layer}{part}")
    _add_legend(result, spans)
    result.draw_without_rendering()  # the layout, and so the size of a box, is known only then
    for axes in panels:
        _write_labels(axes)
    return result


def phases_ms(spans_of_ranks: Sequence[Spans], layer: int | None = None) -> float:
    """Length of the longer phase of a layer, in ms: `until_ms` for it alone."""
    shown = _of_layer(spans_of_ranks, layer)[1]
    parts = [_from_zero(shown, phase) for phase in PHASES]
    return max(span.end_ms for part in parts for spans in part.values() for span in spans)


def _of_layer(spans_of_ranks: Sequence[Spans], layer: int | None) -> tuple[int, dict[int, Spans]]:
    """The layer to show, and its spans by rank where there are any."""
    check_spans(spans_of_ranks)
    layers = sorted({span.layer for spans in spans_of_ranks for span in spans})
    chosen = layers[-1] if layer is None else layer
    if chosen not in layers:
        raise ValueError(f"layer {chosen}: there are spans of {layers} only")
    of_layer = [[span for span in spans if span.layer == chosen] for spans in spans_of_ranks]
    return chosen, {rank: spans for rank, spans in enumerate(of_layer) if spans}


def _from_zero(spans_of_ranks: Mapping[int, Spans], phase: Phase) -> dict[int, list[Span]]:
    """The spans of a phase, in ms since the first one of any rank."""
    of_phase = {rank: [span for span in spans if span.phase == phase] for rank, spans in spans_of_ranks.items()}
    start_ms = min((span.start_ms for spans in of_phase.values() for span in spans), default=0.0)
    return {
        rank: [replace(span, start_ms=span.start_ms - start_ms, end_ms=span.end_ms - start_ms) for span in spans]
        for rank, spans in of_phase.items()
    }


def _share(spans_of_ranks: Sequence[Spans], phase: Phase) -> str:
    lanes: tuple[Hidden, ...] = ("communication", "migration")
    found = {lane: hidden_share_of_ranks(spans_of_ranks, phase, lane) for lane in lanes}
    shares = [f"{each.share:.1%} of the {lane}" for lane, each in found.items() if each.communication_ms]
    return f"{', '.join(shares)} is hidden" if shares else "no communication"


def _word(span: Span) -> str:
    return "wait" if span.lane == "wait" else _SHOWN.get(span.kind, span.kind)


def _colour(span: Span) -> str:
    """The name in `OPERATORS` whose colour a span has."""
    if span.lane == "migration":
        return "dispatch" if span.kind == "read" else "combine"
    return "wait" if span.lane == "wait" else coloured_as(span.kind)


def _style(kind: str) -> dict[str, Any]:
    edge, hatch = ("#9A9A9A", "////") if kind == "wait" else (INK, None)
    return {"facecolor": OPERATORS[kind], "edgecolor": edge, "hatch": hatch, "linewidth": 0.5}


def _draw_phase(axes: Axes, spans_of_ranks: dict[int, list[Span]]) -> None:
    from matplotlib.patches import Rectangle

    cut = {(span.lane, span.name) for spans in spans_of_ranks.values() for span in spans if span.chunk > 0}
    lanes, ticks = lanes_of(list(itertools.chain.from_iterable(spans_of_ranks.values()))), dict[float, str]()
    for (place, (rank, spans)), lane in itertools.product(enumerate(spans_of_ranks.items()), lanes):
        top = -(0.4 + 1.1 * len(lanes)) * place - 1.1 * lanes.index(lane)  # of a lane of height 1
        ticks[top - 0.5] = f"rank {rank}  {lane}" if lane == lanes[0] else lane
        rows = rows_of_lane(spans, lane)
        for number, row in enumerate(rows, start=1):
            size = 1 / len(rows)  # chunks in flight at once share their lane's height
            for span in row:
                which = span.migration.expert if span.migration else span.chunk
                label = f"{_word(span)} {which}" if span.migration or (span.lane, span.name) in cut else _word(span)
                corner = (span.start_ms, top - number * size)
                axes.add_patch(Rectangle(corner, span.duration_ms, size, label=label, **_style(_colour(span))))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(min(ticks) - 0.7, 0.2)


def _add_legend(whole: Figure, spans: Iterable[Span]) -> None:
    """The words of the boxes."""
    from matplotlib.patches import Patch

    words: dict[str, dict[str, None]] = {kind: {} for kind in OPERATORS}
    for span in spans:
        words[_colour(span)][_word(span)] = None
    handles = [Patch(label=", ".join(of), **_style(kind)) for kind, of in words.items() if of]
    whole.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


def _write_labels(axes: Axes) -> None:
    """A label lies flat in its box, else upright, else its chunk number does, else the legend has to do."""
    for box in axes.patches:
        room, label = box.get_window_extent(), str(box.get_label())
        colour = "white" if label.startswith("attention") else "black"  # attention has the only dark box
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour, "in_layout": False}
        text = axes.annotate(label, (0.5, 0.5), xycoords=box, **style)
        if box.get_hatch():
            text.set_bbox({"facecolor": box.get_facecolor(), "edgecolor": "none", "pad": 0.5})
        chunk = label.rsplit(" ", 1)[-1]
        for content, rotation, size in [(label, *how) for how in _WRITINGS] + [(chunk, 0, 9)] * chunk.isdigit():
            text.set(text=content, rotation=rotation, fontsize=size)
            extent = text.get_window_extent()
            if extent.width < 0.96 * room.width and extent.height < 0.95 * room.height:
                break
        else:
            text.remove()


_WRITINGS = ((0, 9), (0, 7.5), (90, 9), (90, 7.5))
"""Rotation and size of a label, best first."""
