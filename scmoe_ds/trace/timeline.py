"""A measured step as files: a trace for Perfetto, and a figure (timeline_figure.py)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scmoe_ds.trace.recorder import Span
from scmoe_ds.trace.spans import LANES, Spans, check_spans, gather_spans, nanoseconds, rows_of_lane
from scmoe_ds.trace.timeline_figure import draw


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

    Waits are part of the compute thread, named "wait: dispatch". What a reader of experts reads and what it copies have
    threads of their own. Raises ValueError and OSError as `save_timeline`.
    """
    check_spans(spans_of_ranks)
    metadata: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(spans_of_ranks):
        names = {"process_name": {"name": f"rank {rank}"}, "process_sort_index": {"sort_index": rank}}
        metadata += [{"ph": "M", "pid": rank, "name": name, "args": args} for name, args in names.items()]
        # Perfetto takes a thread whose id is its process's for the main thread and moves it up: no id is a rank's.
        thread = itertools.count((rank + 1) * 1000)
        for name, rows in _threads(spans):
            # "X" events of one thread may nest but not overlap. Chunks in flight do overlap: where they do, they go to
            # further threads. Async events would allow it, but Perfetto draws them apart from the threads.
            for number, row in enumerate(rows or [[]], start=1):
                place = {"pid": rank, "tid": next(thread)}
                names = {"thread_name": {"name": name if number == 1 else f"{name} {number}"}}
                names["thread_sort_index"] = {"sort_index": place["tid"]}
                metadata += [{"ph": "M", **place, "name": name, "args": args} for name, args in names.items()]
                events += [{"ph": "X", **place, **_trace_event(span)} for span in row]
    events.sort(key=lambda event: event["ts"])
    trace = {"traceEvents": metadata + events, "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _threads(spans: Spans) -> Iterator[tuple[str, list[list[Span]]]]:
    """Names of threads, top to bottom, and their rows of spans."""
    for lane in LANES[:2]:
        yield lane, rows_of_lane(spans, lane)
    readers: dict[str, list[Span]] = {}
    for span in spans:
        if span.migration is not None:
            readers.setdefault(f"reader {span.migration.reader + 1}: {span.kind}", []).append(span)
    for name in sorted(readers):
        yield name, rows_of_lane(readers[name], "migration")


def _trace_event(span: Span) -> dict[str, Any]:
    migration = {} if span.migration is None else asdict(span.migration)
    start_ns, end_ns = nanoseconds(span.start_ms), nanoseconds(span.end_ms)
    return {
        "name": f"wait: {span.name}" if span.lane == "wait" else span.name,
        "cat": span.phase,
        "ts": start_ns / 1000,  # the format's unit is the microsecond
        "dur": (end_ns - start_ns) / 1000,
        "args": {"layer": span.layer, "chunk": span.chunk, "phase": span.phase, **migration},
    }
