"""The inference benchmarks: every row runs, offloaded rows say what resident ones say, tables are of the right numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.harness.variants import Shape
from benchmarks.serving import figures as serving_figures
from benchmarks.serving import inference, offload
from scmoe_ds.engine import connect
from scmoe_ds.planner.simulation import Mode


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.mark.parametrize("phase", inference.PHASES)
def test_every_served_row_runs(phase: Mode) -> None:
    shape = Shape("tiny", 32, 4, 4, 8 if phase == "prefill" else 1, 2, 1.25)
    for name, row in inference.rows().items():
        server = inference.Server(row, phase, shape, "collective")
        server.warm_up()
        assert bool(server.slots()) == (not row.stock), name


def test_rows_of_one_section_differ_in_their_schedule_only() -> None:
    """Serial, overlapped and without communication: the same weights give the same tokens."""
    shape, found = Shape("tiny", 32, 4, 3, 8, 2, 1.25), []
    for name in ("ScMoE Pos-2, auto", "ScMoE Pos-2, serial"):
        server = inference.Server(inference.rows()[name], "prefill", shape, "collective")
        with torch.no_grad():
            found.append(server.model(torch.arange(16).view(2, 8)).logits)
    assert torch.equal(*found)


def test_offloaded_rows_say_the_same(tmp_path: Path) -> None:
    """Also with guessed experts, and with a file of another dtype than the computation's."""
    for architecture, file_dtype in (("topk", "fp32"), ("scmoe", "bf16")):
        path = tmp_path / architecture
        offload.write_model("tiny", architecture, "pos2", file_dtype, path)
        flags = {"path": str(path), "dtype": "fp32", "places": 4}
        resident, offloaded = (offload.Worker({**flags, "offloaded": each}) for each in (False, True))
        text = resident.turn("resident", 6, 3)["tokens"]
        assert len(text) == 7
        modes = [*offload.MODES[1:], offload.GUESSED] if architecture == "topk" else offload.MODES[1:]
        for mode in modes:
            answer = offloaded.turn(mode, 6, 3)
            assert answer["tokens"] == text and answer["counts"]["used"] > 0
            assert (answer["counts"]["predicted"] > 0) == (mode == offload.GUESSED)
        assert all(worker.totals()["peak_bytes"] > 1 << 20 for worker in (resident, offloaded))
        assert resident.totals()["window_ms"] > 0 or architecture == "topk"


def test_offload_table() -> None:
    times = {"resident": [10.0, 10.0, 20.0], "offload": [20.0, 30.0, 40.0], "offload-async": [15.0, 15.0, 25.0]}
    late = {"waited_s": 0.024, "migrations": 2, "used": 3, "hits": 1, "predicted": 0, "confirmed": 0}
    found = {
        "times": times,
        "totals": {"resident": {"peak_bytes": 1000, "window_ms": 6.0}, "offload": {"peak_bytes": 500}},
        "texts": {name: [[1, 2]] for name in times},
        "counts": {"resident": {}, "offload": late, "offload-async": late},
    }
    resident, blocking, early = offload.table(found, "x")
    assert early["row"] == "x offload-async"
    assert resident["removed_percent"] is None and blocking["removed_percent"] is None
    assert [round(value["extra_percent"]["median"]) for value in (resident, blocking, early)] == [0, 100, 50]
    assert early["removed_percent"]["median"] == 75  # 50, 75 and 75 %
    assert (early["memory_of_resident"], early["window_ms"], early["migration_ms"]) == (0.5, 6.0, 12.0)
    assert early["same_text"]
    record = {
        "rows": [resident, blocking, early],
        "environment": dict.fromkeys(("date", "device", "torch", "commit"), "x"),
        **dict.fromkeys(("tier", "model", "command", "dtype", "file_dtype", "rounds", "tokens", "places"), "x"),
    }
    assert "6.0 / 12.0 ms = 50 %" in offload.markdown(record)
    drawn = serving_figures.latencies(record)
    assert [len(panel.patches) for panel in drawn.axes] == [3, 3]
    assert drawn.axes[0].patches[1].get_width() == 30 and drawn.axes[1].patches[0].get_width() == 1000 / 1e9


def test_figure_of_speedups() -> None:
    row = {"row": "ScMoE", "speedup": {"median": 2.0, "p10": 1.5, "p90": 2.25}}
    record = {"phases": {phase: {"rows": [row, row], "link": {"share": 0.6}} for phase in inference.PHASES}}
    drawn = serving_figures.speedups(record)
    assert [[bar.get_width() for bar in panel.patches] for panel in drawn.axes] == [[2.0, 2.0]] * 2
