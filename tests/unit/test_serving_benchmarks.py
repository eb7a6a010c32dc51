"""The inference benchmarks: every row runs, offloaded rows say what resident ones say, tables are of the right numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inference, offload
from benchmarks.variants import Shape
from scmoe_ds.engine import connect
from scmoe_ds.inference.phases import PHASES, Phase


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.mark.parametrize("phase", PHASES)
def test_every_served_row_runs(phase: Phase) -> None:
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
    for architecture, file_dtype, modes in (("topk", "fp32", offload.MODES), ("scmoe", "bf16", offload.MODES[1:])):
        path = tmp_path / architecture
        offload.write_model("tiny", architecture, "pos2", file_dtype, path)
        flags = {"path": str(path), "dtype": "fp32", "places": 4, "guess": False}
        rows = [{**flags, "mode": mode} for mode in modes]
        rows += [{**flags, "mode": "offload-async", "guess": True}] * (architecture == "topk")
        workers = [offload.Worker(row) for row in rows]
        texts = [worker.turn(6, 3)["tokens"] for worker in workers]
        assert len(texts[0]) == 7 and all(text == texts[0] for text in texts)
        totals = [worker.totals() for worker in workers]
        assert all(total["peak_bytes"] > 1 << 20 for total in totals)
        assert all(total["counts"].get("used", 1) for total in totals)
    resident = offload.Worker({**flags, "mode": "resident"})
    assert resident.totals()["window_ms"] > 0


def totals(peak: int, **counts: Any) -> dict[str, Any]:
    return {"peak_bytes": peak, "counts": counts, "window_ms": 6.0}


def test_offload_table() -> None:
    times = {"x resident": [10.0, 10.0, 20.0], "x offload": [20.0, 30.0, 40.0], "x offload-async": [15.0, 15.0, 25.0]}
    late = {"waited_s": 0.024, "migrations": 2, "used": 3, "hits": 1, "confirmed": 0}
    found = {
        "times": times,
        "totals": {
            "x resident": totals(1000),
            "x offload": totals(400, **late),
            "x offload-async": totals(500, **late),
        },
        "texts": {name: [[1, 2]] for name in times},
    }
    resident, blocking, early = offload.table(found, "x")
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
