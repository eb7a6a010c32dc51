"""Measured spans made visible: the hidden share of the communication, a trace for Perfetto, a figure.

Read `save_timeline` first. Ranks have clocks of their own, each from the start of its recording: what is compared
across ranks here are durations, never moments.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from scmoe_ds.overlap.recorder import Phase, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Spans = Sequence[Span]

_LANES = ("compute", "communication")
_PHASES: tuple[Phase, ...] = ("forward", "backward")
_MAX_RANKS_DRAWN = 8  # beyond that a figure is too high to read; the trace and the title's share have them all

# The seven colours that Okabe and Ito chose to be told apart by colour-blind people as well.
_COLOURS = {
    "attention": "#0072B2", "mlp": "#56B4E9", "shared": "#009E73", "experts": "#D55E00",
    "gate, encode, decode": "#F0E442", "dispatch": "#E69F00", "combine": "#CC79A7",
    "other": "#999999", "wait": "#EEEEEE",
}  # fmt: skip


@dataclass(frozen=True)
class HiddenShare:
    """How long all-to-alls were under way (communication_ms), and how long computation stood still for them."""

    communication_ms: float
    exposed_ms: float

    @property
    def share(self) -> float:
        """The part of the communication that ran beside computation, from 0 to 1; 1 without communication."""
        if self.communication_ms == 0:
            return 1.0
        return min(1.0, max(0.0, 1.0 - self.exposed_ms / self.communication_ms))


def hidden_share(spans: Spans, phase: Phase | None = None) -> HiddenShare:
    """Of one rank, all layers of the spans together; both phases by default.

    Chunks in flight at once count once: the communication is as long as the union of its spans.
    """
    of_phase = [span for span in spans if phase in (None, span.phase)]
    communication_ms = _union_ms(span for span in of_phase if span.lane == "communication")
    return HiddenShare(communication_ms, exposed_ms=_union_ms(span for span in of_phase if span.lane == "wait"))


def hidden_share_of_ranks(spans_of_ranks: Sequence[Spans], phase: Phase | None = None) -> HiddenShare:
    """The sums over all ranks of both times; `share` is then the mean share, weighted by communication."""
    of_ranks = [hidden_share(spans, phase) for spans in spans_of_ranks]
    return HiddenShare(sum(one.communication_ms for one in of_ranks), sum(one.exposed_ms for one in of_ranks))


def _union_ms(spans: Iterable[Span]) -> float:
    length_ms, reached_ms = 0.0, -math.inf
    for span in sorted(spans, key=lambda span: span.start_ms):
        length_ms += max(0.0, span.end_ms - max(span.start_ms, reached_ms))
        reached_ms = max(reached_ms, span.end_ms)
    return length_ms


def gather_spans(spans: Spans, group: dist.ProcessGroup | None = None) -> list[list[Span]] | None:
    """Every rank's spans on the group's rank 0, in the order of ranks; None on the others.

    Collective: every rank of the group calls it. Without a process group it is a world of one.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [list(spans)]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(spans), group=group)  # gather_object is not there on every backend
    return gathered if dist.get_rank(group) == 0 else None


def save_timeline(spans: Spans, directory: str | Path, iteration: int) -> list[Path]:
    """Gathers one step's spans; rank 0 writes its trace (.json) and figure (.png) and returns their paths, others [].

    Collective: every rank calls it with its own spans. The directory is made if needed. Errors occur on rank 0 only.

    Raises:
        ValueError: no rank has a span, or a span's times are out of order.
        OSError: a file cannot be written.
        ImportError: matplotlib is missing; the trace is written by then.
    """
    spans_of_ranks = gather_spans(spans)
    if spans_of_ranks is None:
        return []
    stem = Path(directory) / f"scmoe_trace_iteration_{iteration}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    trace, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    write_trace(spans_of_ranks, trace)
    draw(spans_of_ranks, picture, title_prefix=f"iteration {iteration}, ")
    return [trace, picture]


def write_trace(spans_of_ranks: Sequence[Spans], path: str | Path) -> None:
    """Writes the trace event format (JSON) that ui.perfetto.dev and chrome://tracing open: one process per rank.

    Waits are part of the compute thread, named "wait: dispatch". Raises ValueError and OSError as `save_timeline`.
    """
    _check(spans_of_ranks)
    metadata: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(spans_of_ranks):
        names = {"process_name": {"name": f"rank {rank}"}, "process_sort_index": {"sort_index": rank}}
        metadata += [{"ph": "M", "pid": rank, "name": name, "args": args} for name, args in names.items()]
        # Perfetto takes a thread whose id is its process's for the main thread and moves it up: no id is a rank's.
        thread = itertools.count((rank + 1) * 1000)
        for lane in _LANES:
            # "X" events of one thread may nest but not overlap. Chunks in flight do overlap: where they do, they go to
            # further threads. Async events would allow it, but Perfetto draws them apart from the threads.
            for number, row in enumerate(_rows(spans, lane) or [[]], start=1):
                place = {"pid": rank, "tid": next(thread)}
                names = {"thread_name": {"name": lane if number == 1 else f"{lane} {number}"}}
                names["thread_sort_index"] = {"sort_index": place["tid"]}
                metadata += [{"ph": "M", **place, "name": name, "args": args} for name, args in names.items()]
                events += [{"ph": "X", **place, **_trace_event(span)} for span in row]
    events.sort(key=lambda event: event["ts"])
    trace = {"traceEvents": metadata + events, "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _trace_event(span: Span) -> dict[str, Any]:
    start_ns, end_ns = _ns(span.start_ms), _ns(span.end_ms)
    return {
        "name": f"wait: {span.name}" if span.lane == "wait" else span.name,
        "cat": span.phase,
        "ts": start_ns / 1000,  # the format's unit is the microsecond
        "dur": (end_ns - start_ns) / 1000,
        "args": {"layer": span.layer, "chunk": span.chunk, "phase": span.phase},
    }


def _ns(time_ms: float) -> int:
    """Whole nanoseconds: in floating point one span could seem to start before the last one's end."""
    return round(time_ms * 1e6)


def _rows(spans: Iterable[Span], lane: str) -> list[list[Span]]:
    """The spans of a lane, in as few rows as hold them without overlap. Waits belong to the compute lane."""
    of_lane = [span for span in spans if (span.lane == "communication") == (lane == "communication")]
    rows: list[list[Span]] = []
    for span in sorted(of_lane, key=lambda span: (_ns(span.start_ms), _ns(span.end_ms))):
        free = next((row for row in rows if _ns(row[-1].end_ms) <= _ns(span.start_ms)), None)
        if free is None:
            rows.append([span])
        else:
            free.append(span)
    return rows


def _check(spans_of_ranks: Sequence[Spans]) -> None:
    if not any(spans_of_ranks):
        raise ValueError("no spans: nothing was recorded on any rank")
    for rank, spans in enumerate(spans_of_ranks):
        if wrong := [span for span in spans if not 0 <= span.start_ms <= span.end_ms < math.inf]:
            raise ValueError(f"rank {rank}: 0 ≤ start_ms ≤ end_ms < inf does not hold for {wrong[0]}")


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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "`pip install matplotlib`, or open the trace in ui.perfetto.dev, which needs no package"
        raise ImportError(f"the figure of a timeline needs matplotlib: {remedy}") from error
    layer, shown = _of_layer(spans_of_ranks, layer)
    drawn = dict(itertools.islice(shown.items(), _MAX_RANKS_DRAWN))
    spans = list(itertools.chain(*drawn.values()))
    phases = [phase for phase in _PHASES if any(span.phase == phase for span in spans)]
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
    _check(spans_of_ranks)
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
    name = "wait" if span.lane == "wait" else span.name
    return next((kind for kind in _COLOURS if name in kind.split(", ")), "other")


def _style(kind: str) -> dict[str, Any]:
    edge, hatch = ("#9A9A9A", "////") if kind == "wait" else ("#333333", None)
    return {"facecolor": _COLOURS[kind], "edgecolor": edge, "hatch": hatch, "linewidth": 0.5}


def _draw_phase(axes: Axes, spans_of_ranks: dict[int, Spans]) -> None:
    from matplotlib.patches import Rectangle

    cut = {(span.lane, span.name) for spans in spans_of_ranks.values() for span in spans if span.chunk > 0}
    ticks: dict[float, str] = {}
    for (place, (rank, spans)), lane in itertools.product(enumerate(spans_of_ranks.items()), _LANES):
        top = -2.6 * place - 1.1 * _LANES.index(lane)  # of a lane of height 1
        ticks[top - 0.5] = f"rank {rank}  {lane}" if lane == _LANES[0] else lane
        rows = _rows(spans, lane)
        for number, row in enumerate(rows, start=1):
            size = 1 / len(rows)  # chunks in flight at once share their lane's height
            for span in row:
                name = "wait" if span.lane == "wait" else span.name
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
