"""The inference benchmarks: every row runs, offloaded rows say what resident ones say, tables are of the right numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.harness.no_link import LocalCopy
from benchmarks.harness.variants import Shape
from benchmarks.serving import copies, inference, offload, offload_disk
from benchmarks.serving import figures as serving_figures
from benchmarks.serving import offload_worker as worker
from benchmarks.serving.copied_model import LIMITS, NONE, Copied, Row, even_split, near_split, rows
from scmoe_ds.engine import connect
from scmoe_ds.inference.attachment import moe_layers
from scmoe_ds.moe.decisions.copies import Copy, Costs
from scmoe_ds.offload.files import ExpertFile
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
        worker.write_model("tiny", architecture, "pos2", file_dtype, path)
        flags = {"path": str(path), "dtype": "fp32", "places": 4}
        guessed = [worker.GUESSED] * (architecture == "topk")
        modes = ["resident", worker.AGAIN, *worker.MODES[1:], *guessed]
        found = worker.measure(flags, modes, 2, 6, in_process=True)
        assert [len(text) for text in found["texts"]["resident"]] == [7] * 3
        assert all(entry["same_text"] for entry in offload.table(found, "x"))
        for mode in modes[2:]:
            counts = [answer["counts"] for answer in found["answers"][mode]]
            assert all(0 < each["used"] <= 6 * 4 * (1 + len(guessed)) for each in counts), "decode steps alone"
            assert all((each["predicted"] > 0) == (mode == worker.GUESSED) for each in counts)
        assert all(peak > 1 << 20 for peak in found["peaks"].values())
        assert all((answer["window_ms"] > 0) == (not guessed) for answer in found["answers"][worker.AGAIN])


def test_offload_table() -> None:
    """By hand: a window of 6 ms, a migration of 12; the early mode waits 8 where 6 were possible."""
    times = {"resident": [10.0, 10.0, 20.0], "offload": [22.0, 22.0, 34.0], "offload-async": [19.0, 18.5, 29.0]}
    counts = {"migrations": 2, "used": 3, "hits": 1, "predicted": 0, "confirmed": 0, "migrated_bytes": 48_000_000}
    waited = {"offload": 0.024, "offload-async": 0.016}
    answers = {
        mode: [
            {"pair_ms": each, "counts": {**counts, "waited_s": waited[mode]} if mode in waited else {}} for each in own
        ]
        for mode, own in times.items()
    }
    again = [{"pair_ms": each, "counts": {}, "window_ms": 6.0} for each in (10.1, 10.1, 20.2)]
    found: dict[str, Any] = {
        "answers": {**answers, worker.AGAIN: again},
        "peaks": {mode: 1000 if "resident" in mode else 500 for mode in (*times, worker.AGAIN)},
        "texts": {mode: [[1, 2]] for mode in (*times, worker.AGAIN)},
    }
    resident, blocking, early, _ = entries = offload.table(found, "x")
    assert early["row"] == "x offload-async" and early["same_text"] and early["memory_of_resident"] == 0.5
    assert resident["removed_percent"] is None and blocking["removed_percent"] is None
    assert [round(entry["extra_percent"]["median"]) for entry in (resident, blocking, early)] == [0, 120, 85]
    allowed = {key: value["median"] for key, value in offload.window(found, "x").items() if key != "row"}
    assert allowed == pytest.approx(
        {
            "window_ms": 6,
            "migration_ms": 12,
            "gigabytes_per_s": 2,
            "limit_percent": 50,
            "reached_percent": 100 * 3.5 / 12,
            "share_percent": 200 * 3.5 / 12,
            "computation_slowed_ms": 0.5,
            "migration_slowed_ms": 2.5,
            "again_percent": 1,
        }
    )
    record = {
        "rows": entries,
        "windows": [offload.window(found, "x")],
        "environment": dict.fromkeys(("date", "device", "torch", "commit"), "x"),
        **dict.fromkeys(("tier", "model", "command", "dtype", "rounds", "tokens", "places"), "x"),
    }
    assert "| x | 6.0 (6.0–6.0) / 12.0 (12.0–12.0) | 2.00 (2.00–2.00) | 50 (50–50) | 29 (" in offload.markdown(record)
    drawn = serving_figures.latencies(record)
    assert [len(panel.patches) for panel in drawn.axes] == [4, 4]
    assert drawn.axes[0].patches[1].get_width() == 22 and drawn.axes[1].patches[0].get_width() == 1000 / 1e9


def test_figure_of_speedups() -> None:
    row = {"row": "ScMoE", "speedup": {"median": 2.0, "p10": 1.5, "p90": 2.25}}
    record = {"phases": {phase: {"rows": [row, row], "link": {"share": 0.6}} for phase in inference.PHASES}}
    drawn = serving_figures.speedups(record)
    assert [[bar.get_width() for bar in panel.patches] for panel in drawn.axes] == [[2.0, 2.0]] * 2


def test_rates_of_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload_disk, "SIZES_KIB", (4, 64))
    monkeypatch.setattr(offload_disk, "DEPTHS", (1, 2))
    (tmp_path / "file").write_bytes(bytes(range(256)) * 1024)
    file = ExpertFile(tmp_path / "file", "again")
    rows = offload_disk.measure(file, 256 << 10, 2, 512 << 10)
    assert len(rows) == 8 and all(row["gigabytes_per_s"]["p10"] > 0 for row in rows)
    record = {
        "rows": rows,
        "rounds": 2,
        "command": "x",
        "environment": dict.fromkeys(("date", "device", "commit"), "x"),
    }
    assert offload_disk.markdown(record).count("MiB a read") == 4
    buffer = offload_disk.memory(64 << 10, "4 KiB")
    offload_disk.rate(file, 256 << 10, [buffer], 64 << 10, 0)
    assert bytes(buffer.numpy()) == bytes(range(256)) * 256


def test_skewed_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The busiest of four experts gets the wanted multiple of the mean; more than all tokens is refused."""
    shape = Shape("tiny", 32, 4, 16, 8, 4, 1.25)
    monkeypatch.setattr("benchmarks.serving.copied_model.shape_of", lambda phase, settings: shape)
    for kind, served in copies.MODELS.items():
        model = Copied(served, "prefill", {"experts": 4, "method": "collective"})
        # A second one would read what the first one made of its rows, which rows of LIMITS change.
        assert len(moe_layers(model.server.model)) == 1
        for skew in (1.0, 1.8, 4.0) if kind == "top-1" else (1.8,):
            model.skew(skew)
            model.add(NONE, Row(), Costs(0.0, 1.0, 0.0))
            counts = model.server.model.runs[0].blocks[-1].moe(model.tokens_TD)[2]
            assert abs(counts[0] / counts.float().mean() - skew) < 0.15, (kind, skew, counts)
            assert model.loads(NONE) == [len(model.tokens_TD)]
    layer = model.server.model.runs[0].blocks[-1].moe
    for name, each in LIMITS.items():
        model.add(name, each, Costs(0.0, 1.0, 0.0))
        model.whole(name)
        counts, without = (
            layer(model.tokens_TD)[2],
            isinstance(layer.deepspeed_moe.experts.deepspeed_experts[0], nn.Identity),
        )
        assert (counts - counts.float().mean()).abs().max() < 0.15 * counts.float().mean(), (name, counts)
        assert (isinstance(layer.transport, LocalCopy), without) == (not each.travels, not each.computes)
    scale_T1 = (model.layer(name) / model.tokens_TD).median(1, keepdim=True).values  # of experts that change nothing
    torch.testing.assert_close(model.layer(name), scale_T1 * model.tokens_TD)
    model.use(NONE)
    assert layer(model.tokens_TD)[2][0] > 1.5 * len(model.tokens_TD) / 4 and layer.transport.method == "collective"
    with pytest.raises(ValueError, match="0 to 1 / 1 of the rows"):
        model.skew(5.0)


def test_table_of_copies() -> None:
    assert even_split([[9, 4], [3, 0]], [Copy(0, 1)], Costs(0.0, 1.0, 0.0)) == [[4, 1]]
    assert near_split([[9, 4], [3, 0]], [Copy(0, 1)], Costs(0.0, 1.0, 0.0)) == [[0, 3]]
    spreads = {"speedup": {"median": 1.5, "p10": 1.4, "p90": 1.6}, "reached": {"median": 0.9, "p10": 0.8, "p90": 1.0}}
    timed = {"median_ms": 5.0, **spreads}
    parts = [{"experts": 2.0, "exposed communication": 1.0, "attention": 0.5}] * 2
    row = {"layer": timed, "loads": [3, 1], "parts_ms": parts, "difference": 0.0}
    found = {
        "skew": 4.0,
        "rows": dict.fromkeys(rows(2), row),
        "costs": {"expert_ms": 1.0, "row_ms": 0.1, "travel_ms": 0.2},
        "greatest_output": 1.0,
        "passes": {kind: dict.fromkeys(copies.OF_PASSES, timed) for kind in copies.MODELS},
    }
    link = {"rate_mbit": 100.0, "share": 0.6}
    settings = {"share": 0.6, "experts": 4, "rounds": 30, "method": "send_receive", "shape": "swin"}
    record = {"command": "c", "environment": {}, "settings": settings}
    text = copies.markdown(record | {"found": {"prefill": {"link": link, "skews": [found]}}})
    assert "| 1 copy per rank | 1.50 | 5.0 | 1.500 (1.400–1.600) | – |" in text
    assert text.count("| even gate, no row travels | 5.0 | 1.500 (1.400–1.600) | 0.900 (0.800–1.000) | 5.0 |") == 1
    assert "rank 1: experts 2.0, exposed communication 1.0, rest 0.5" in text
