"""Hidden share, trace and figure of spans whose numbers can be checked by hand."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch.distributed as dist
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lab.distributed import run_distributed
from scmoe_ds.trace.recorder import Lane, Migration, Phase, Span
from scmoe_ds.trace.spans import HiddenShare, gather_spans, hidden_share, hidden_share_of_ranks
from scmoe_ds.trace.timeline import save_timeline, write_trace
from scmoe_ds.trace.timeline_figure import draw, figure, phases_ms

BLUE, SKY, ORANGE, PINK = "#0072b2", "#56b4e9", "#e69f00", "#cc79a7"
VERMILLION, YELLOW, GREY = "#d55e00", "#f0e442", "#eeeeee"


def span(
    name: str,
    start_ms: float,
    end_ms: float,
    lane: Lane = "compute",
    phase: Phase = "forward",
    chunk: int = 0,
    layer: int = 0,
) -> Span:
    return Span(layer, name, name, lane, phase, chunk, start_ms, end_ms)


# Two chunks; their dispatches are in flight together from 2 to 4. Communication 1-6, 7-10: 8 ms; waits 1 ms + 1.4 ms.
FORWARD = [
    span("gate", 0.0, 1.0),
    span("dispatch", 1.0, 4.0, "communication"),
    span("dispatch", 2.0, 6.0, "communication", chunk=1),
    span("attention", 1.0, 3.0),
    span("dispatch", 3.0, 4.0, "wait"),
    span("experts", 4.0, 7.0),
    span("combine", 7.0, 10.0, "communication"),
    span("mlp", 7.0, 8.6),
    span("combine", 8.6, 10.0, "wait"),
]
# Communication 20-25: 5 ms; wait 1 ms.
BACKWARD = [
    span("combine", 20.0, 25.0, "communication", "backward"),
    span("mlp", 20.0, 24.0, "compute", "backward"),
    span("combine", 24.0, 25.0, "wait", "backward"),
]
RANK_0 = FORWARD + BACKWARD
# 2 ms of communication, nothing of it exposed.
RANK_1 = [span("dispatch", 0.5, 2.5, "communication"), span("attention", 0.5, 3.0)]


def _times(share: HiddenShare) -> list[float]:
    return [round(share.communication_ms, 9), round(share.exposed_ms, 9)]


def test_hidden_share_counts_chunks_in_flight_once() -> None:
    assert _times(hidden_share(FORWARD)) == [8.0, 2.4]
    assert hidden_share(FORWARD).share == pytest.approx(0.7)
    nested = [span("dispatch", 0, 10, "communication"), span("dispatch", 2, 3, "communication", chunk=1)]
    assert _times(hidden_share([*nested, span("dispatch", 9, 12, "communication", chunk=2)])) == [12, 0]


def test_hidden_share_of_a_phase_and_of_ranks() -> None:
    assert _times(hidden_share(RANK_0, "backward")) == [5.0, 1.0]
    assert hidden_share(RANK_0, "backward").share == pytest.approx(0.8)
    assert _times(hidden_share(RANK_0)) == [13.0, 3.4]
    both = hidden_share_of_ranks([RANK_0, RANK_1], "forward")
    assert (_times(both), both.share) == ([10.0, 2.4], pytest.approx(0.76))


def test_hidden_share_at_its_ends() -> None:
    dispatch = span("dispatch", 0, 5, "communication")
    assert hidden_share([]).share == hidden_share([span("mlp", 0, 5)]).share == hidden_share([dispatch]).share == 1.0
    assert hidden_share([dispatch, span("dispatch", 0, 6, "wait")]).share == 0.0


def _trace(spans_of_ranks: list[list[Span]], directory: Path) -> dict:
    write_trace(spans_of_ranks, directory / "trace.json")
    return json.loads((directory / "trace.json").read_text())


def test_trace_has_every_span_in_microseconds(tmp_path: Path) -> None:
    trace = _trace([RANK_0, RANK_1], tmp_path)
    assert trace["displayTimeUnit"] == "ms"
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)
    found = [(e["pid"], e["cat"], e["name"], e["args"]["chunk"], e["ts"], e["dur"]) for e in events]
    expected = [
        (0, "forward", *event)
        for event in [
            ("gate", 0, 0, 1000),
            ("attention", 0, 1000, 2000),
            ("experts", 0, 4000, 3000),
            ("mlp", 0, 7000, 1600),
            ("dispatch", 0, 1000, 3000),
            ("dispatch", 1, 2000, 4000),
            ("combine", 0, 7000, 3000),
            ("wait: dispatch", 0, 3000, 1000),
            ("wait: combine", 0, 8600, 1400),
        ]
    ]
    backward = [("combine", 0, 20000, 5000), ("mlp", 0, 20000, 4000), ("wait: combine", 0, 24000, 1000)]
    expected += [(0, "backward", *event) for event in backward]
    expected += [(1, "forward", "dispatch", 0, 500, 2000), (1, "forward", "attention", 0, 500, 2500)]
    assert sorted(found) == sorted(expected)
    assert all(event["args"]["phase"] == event["cat"] and event["args"]["layer"] == 0 for event in events)


def test_trace_names_processes_and_threads(tmp_path: Path) -> None:
    events = _trace([RANK_0, RANK_1, []], tmp_path)["traceEvents"]
    metadata = [event for event in events if event["ph"] == "M"]
    assert events[: len(metadata)] == metadata, "names come before what they name"
    processes = {e["pid"]: e["args"]["name"] for e in metadata if e["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 1", 2: "rank 2"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert [name for (pid, _), name in threads.items() if pid == 0] == ["compute", "communication", "communication 2"]
    assert [name for (pid, _), name in threads.items() if pid == 1] == ["compute", "communication"]
    assert all(pid != tid != 0 for pid, tid in threads), "Perfetto moves such a thread to the top"
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in metadata if e["name"] == "thread_sort_index"}
    assert sorted(threads, key=order.__getitem__) == list(threads), "compute above communication"
    for event in (event for event in events if event["ph"] == "X"):
        lane = threads[event["pid"], event["tid"]].split()[0]
        is_communication = event["name"] in ("dispatch", "combine")
        assert lane == ("communication" if is_communication else "compute")


def test_events_of_a_thread_do_not_overlap(tmp_path: Path) -> None:
    # Four chunks in flight, and a border that floating point would shift: 0.1 + 0.2 > 0.3.
    chunks = [span("dispatch", 10 + chunk, 15 + 2 * chunk, "communication", chunk=chunk) for chunk in range(4)]
    border = [span("gate", 0, 0.1 + 0.2), span("encode", 0.3, 1)]
    events = _trace([chunks + border], tmp_path)["traceEvents"]
    spans_of_thread: dict[int, list[tuple[float, float]]] = {}
    for event in (event for event in events if event["ph"] == "X"):
        spans_of_thread.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in spans_of_thread.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert names == ["compute", "communication", "communication 2", "communication 3", "communication 4"]


@pytest.mark.parametrize(("start_ms", "end_ms"), [(0, math.nan), (0, math.inf), (2, 1), (-1, 1)])
def test_times_out_of_order_are_refused(start_ms: float, end_ms: float, tmp_path: Path) -> None:
    wrong = span("mlp", start_ms, end_ms)
    with pytest.raises(ValueError, match=r"rank 1: 0 ≤ start_ms ≤ end_ms < inf does not hold for Span\(.*'mlp'"):
        write_trace([RANK_0, [wrong]], tmp_path / "trace.json")
    with pytest.raises(ValueError, match="rank 1"):
        figure([RANK_0, [wrong]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spans_of_ranks", [[], [[]], [[], []]])
def test_no_spans(spans_of_ranks: list[list[Span]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no spans: nothing was recorded"):
        write_trace(spans_of_ranks, tmp_path / "trace.json")
    with pytest.raises(ValueError, match="no spans: nothing was recorded"):
        draw(spans_of_ranks, tmp_path / "figure.png")


def _boxes(drawn: Figure, panel: int) -> list[tuple[str, float, float, str]]:
    """Label, start, width and colour of what a panel shows."""
    boxes = [box for box in drawn.axes[panel].patches if isinstance(box, Rectangle)]
    return sorted((str(b.get_label()), b.get_x(), round(b.get_width(), 9), to_hex(b.get_facecolor())) for b in boxes)


def _lanes(drawn: Figure, label: str) -> list[tuple[float, float]]:
    """Top and height of the forward boxes of one label."""
    boxes = [box for box in drawn.axes[0].patches if isinstance(box, Rectangle) and box.get_label() == label]
    return [(box.get_y() + box.get_height(), box.get_height()) for box in boxes]


def _legend(drawn: Figure) -> list[str]:
    return [text.get_text() for text in drawn.legends[0].get_texts()]


def test_figure_shows_the_spans() -> None:
    drawn = figure([RANK_0])
    shares = ["forward: 70.0% of the communication is hidden", "backward: 80.0% of the communication is hidden"]
    assert [axes.get_title("left") for axes in drawn.axes] == shares
    assert _boxes(drawn, 0) == [
        ("MLP", 7.0, 1.6, SKY),
        ("attention", 1.0, 2.0, BLUE),
        ("combine", 7.0, 3.0, PINK),
        ("dispatch 0", 1.0, 3.0, ORANGE),
        ("dispatch 1", 2.0, 4.0, ORANGE),
        ("experts", 4.0, 3.0, VERMILLION),
        ("gate", 0.0, 1.0, YELLOW),
        ("wait", 3.0, 1.0, GREY),
        ("wait", 8.6, 1.4, GREY),
    ]
    assert _boxes(drawn, 1) == [("MLP", 0.0, 4.0, SKY), ("combine", 0.0, 5.0, PINK), ("wait", 4.0, 1.0, GREY)]
    assert all((box.get_hatch() is not None) == (box.get_label() == "wait") for box in drawn.axes[0].patches)
    assert _legend(drawn) == ["attention", "MLP", "experts", "gate", "dispatch", "combine", "wait"]


def test_legend_has_the_words_of_the_boxes() -> None:
    kinds = ["attention", "shared in", "shared", "encode", "merge", "novel", "counts"]
    drawn = figure([[span(kind, place, place + 1) for place, kind in enumerate(kinds)]])
    assert _legend(drawn) == ["attention", "shared in, shared expert", "encode, merge", "novel, counts"]
    assert {label for label, *_ in _boxes(drawn, 0)} == {word for each in _legend(drawn) for word in each.split(", ")}


def test_both_phases_start_at_0_on_one_scale() -> None:
    late = [replace(each, start_ms=each.start_ms + 1000, end_ms=each.end_ms + 1000) for each in RANK_0]
    drawn = figure([late])
    assert [min(start for _, start, *_ in _boxes(drawn, panel)) for panel in (0, 1)] == [0.0, 0.0]
    left, right = drawn.axes[0].get_xlim()
    assert drawn.axes[1].get_xlim() == (left, right) and -0.1 < left < 0 and 10 < right < 10.1
    assert phases_ms([RANK_0, RANK_1]) == 10.0
    assert figure([RANK_0], until_ms=40.0).axes[0].get_xlim()[1] == pytest.approx(40.2)


def test_figure_puts_each_rank_below_the_last_and_communication_below_compute() -> None:
    drawn = figure([RANK_0, [], [span("attention", 0, 1), span("dispatch", 0, 1, "communication")]])
    tops = [_lanes(drawn, "attention")[0], _lanes(drawn, "dispatch 0")[0]]
    tops += [_lanes(drawn, "attention")[1], _lanes(drawn, "dispatch 0")[1]]
    # A lane is 1 high. The first rank's second chunk, in flight beside its first, has the lower half.
    assert [height for _, height in tops] == [1.0, 0.5, 1.0, 1.0]
    assert _lanes(drawn, "dispatch 1") == [(pytest.approx(tops[1][0] - 0.5), 0.5)]
    assert all(1 <= above - below < 2 for (above, _), (below, _) in itertools.pairwise(tops))
    axes = drawn.axes[0]
    assert list(axes.get_yticks()) == pytest.approx([top - 0.5 for top, _ in tops])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["rank 0  compute", "communication", "rank 2  compute", "communication"], "rank 1 has no spans"
    assert axes.get_ylim()[0] < tops[-1][0] - 1 and axes.get_ylim()[1] > tops[0][0]


def _titles(drawn: Figure) -> list[str]:
    """Of the figure and its panels."""
    panels = [axes.get_title("left").replace(" of the communication is hidden", "") for axes in drawn.axes]
    return [drawn.get_suptitle(), *panels]


def test_titles_have_the_share_of_all_ranks() -> None:
    assert _titles(figure([RANK_0], "iteration 3, ")) == [
        "iteration 3, MoE layer 0",
        "forward: 70.0%",
        "backward: 80.0%",
    ]
    assert _titles(figure([RANK_0, RANK_1])) == ["MoE layer 0", "forward: 76.0%", "backward: 80.0%"]
    assert _titles(figure([FORWARD])) == ["MoE layer 0", "forward: 70.0%"]
    assert _titles(figure([[span("mlp", 0, 1)]])) == ["MoE layer 0", "forward: no communication"]
    # 8 ms and 9 · 2 ms of communication, 2.4 ms exposed: 90.8 %
    assert _titles(figure([FORWARD] + 9 * [RANK_1])) == ["MoE layer 0 (8 of 10 ranks drawn)", "forward: 90.8%"]
    assert len(figure(10 * [RANK_1]).axes[0].get_yticks()) == 2 * 8


def test_figure_of_one_layer() -> None:
    early, late = [span("mlp", 0, 9), span("dispatch", 0, 9, "communication")], [span("mlp", 90, 94, layer=1)]
    late += [span("dispatch", 90, 92, "communication", layer=1), span("dispatch", 94, 95, "wait", layer=1)]
    drawn = figure([early + late])
    assert [(label, start) for label, start, *_ in _boxes(drawn, 0)] == [("MLP", 0), ("dispatch", 0), ("wait", 4)]
    assert _titles(drawn) == ["MoE layer 1", "forward: 50.0%"]
    drawn = figure([early + late], layer=0)
    assert _boxes(drawn, 0) == [("MLP", 0, 9, SKY), ("dispatch", 0, 9, ORANGE)]
    assert _titles(drawn) == ["MoE layer 0", "forward: 100.0%"]
    with pytest.raises(ValueError, match=r"layer 7: there are spans of \[0, 1\] only"):
        figure([early + late], layer=7)


def test_labels_stay_within_their_boxes() -> None:
    narrow = [span("attention", 0, 100), span("encode", 100, 104), span("gate", 104, 104.3)]
    narrow += [span("experts", 104.3, 104.5), span("experts", 104.5, 107, chunk=1), span("novel", 107, 180)]
    axes = figure([narrow]).axes[0]
    texts = {(text.get_text(), text.get_rotation()) for text in axes.texts}
    assert texts == {("attention", 0), ("encode", 90), ("1", 0), ("novel", 0)}, "flat, upright, the chunk only, none"
    boxes = [box.get_window_extent() for box in axes.patches]
    for text in axes.texts:
        words = text.get_window_extent()
        assert any(b.x0 <= words.x0 and words.x1 <= b.x1 and b.y0 <= words.y0 and words.y1 <= b.y1 for b in boxes)


def _moving(kind: str, expert: int, reader: int, start_ms: float, end_ms: float) -> Span:
    moved = Migration(expert, 4096, "disk", reader, queued_ms=0.5)
    return Span(0, f"expert {expert}", kind, "migration", "forward", 0, start_ms, end_ms, moved)


# Migration 1-6, 7-8: 6 ms; the wait for it 1.5 ms. An all-to-all of 2 ms, half of it waited for.
MIGRATING = [
    _moving("read", 3, 0, 1, 3),
    _moving("read", 5, 1, 2, 5),
    _moving("copy", 3, 0, 3, 4),
    _moving("copy", 5, 1, 5, 6),
    _moving("read", 1, 0, 7, 8),
    span("dispatch", 1, 3, "communication"),
    span("dispatch", 2, 3, "wait"),
    span("mlp", 1, 2),
    replace(span("expert 5", 4.5, 6, "wait"), kind="migration"),
]


def test_migration_is_a_lane_of_its_own(tmp_path: Path) -> None:
    assert _times(hidden_share(MIGRATING)) == [2, 1] and _times(hidden_share(MIGRATING, of="migration")) == [6, 1.5]
    events = _trace([MIGRATING, RANK_1], tmp_path)["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    readers = ["reader 1: copy", "reader 1: read", "reader 2: copy", "reader 2: read"]
    assert list(threads.values()) == ["compute", "communication", *readers, "compute", "communication"]
    found = [(threads[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 0]
    assert ("reader 2: copy", "expert 5", 5000, 1000) in found and ("compute", "wait: expert 5", 4500, 1500) in found
    moved = next(e["args"] for e in events if e["ph"] == "X" and threads[e["tid"]] == "reader 2: read")
    assert moved.items() >= {"expert": 5, "nbytes": 4096, "tier": "disk", "reader": 1, "queued_ms": 0.5}.items()
    drawn = figure([MIGRATING, RANK_1])
    assert _titles(drawn)[1] == "forward: 75.0% of the communication, 75.0% of the migration is hidden"
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == ["rank 0  compute", "communication", "migration", "rank 1  compute", "communication", "migration"]
    assert ("read 5", 1.5, 3.0, ORANGE) in _boxes(drawn, 0) and ("copy 3", 2.5, 1.0, PINK) in _boxes(drawn, 0)
    assert {"read, dispatch", "copy"} <= set(_legend(drawn))
    assert _legend(figure([RANK_0])) == _legend(figure([FORWARD])), "no lane and no word without migration"


def test_draw_writes_the_format_of_the_suffix(tmp_path: Path) -> None:
    draw([RANK_0, RANK_1], tmp_path / "figure.png")
    pixels = matplotlib.image.imread(tmp_path / "figure.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] == 1080
    assert pixels.std() > 0.05, "more than an empty sheet"
    draw([RANK_1], tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()
    with pytest.raises(OSError):
        draw([RANK_1], tmp_path / "nowhere" / "figure.png")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "scmoe_ds\[plots\]", or open'):
        figure([RANK_0])


def test_import_needs_no_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import scmoe_ds.trace.timeline"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_save_in_a_world_of_one(tmp_path: Path) -> None:
    assert gather_spans(RANK_0) == [RANK_0], "no process group"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        paths = save_timeline(RANK_0, tmp_path / "new" / "directory", 7)
    finally:
        dist.destroy_process_group()
    names = ["scmoe_trace_iteration_7.json", "scmoe_trace_iteration_7.png"]
    assert paths == [tmp_path / "new" / "directory" / name for name in names]
    assert matplotlib.image.imread(paths[1]).size > 0
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_timeline(RANK_0, tmp_path / "file", 7)


def _save(directory: str) -> tuple[list[list[Span]] | None, list[Path]]:
    spans = [RANK_0, RANK_1][dist.get_rank()]
    return gather_spans(spans), save_timeline(spans, directory, 3)


def test_save_on_two_ranks(tmp_path: Path) -> None:
    first, second = run_distributed(_save, 2, str(tmp_path))
    assert first[0] == [RANK_0, RANK_1]
    assert second == (None, [])
    assert sorted(tmp_path.iterdir()) == first[1]
    events = json.loads(first[1][0].read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1}
