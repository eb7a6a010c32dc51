"""The benchmark of training with offloaded experts, on a model of a few kilobytes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.speed.train_offload import AGAIN, RESIDENT, Shape, measure, page
from scmoe_ds.engine import connect


def test_a_round_of_every_variant(tmp_path: Path) -> None:
    connect()
    found = measure(Shape(16, 4, 1, 16), 1, str(tmp_path))
    assert list(found["rows"]) == [RESIDENT, AGAIN, "host", "file"]
    assert all(row["same_losses"] for row in found["rows"].values())
    away = [row for row in found["rows"].values() if "window_ms" in row]
    assert len(away) == 2 and all(
        ms > 0 for row in away for key in ("window_ms", "migration_ms") for ms in row[key].values()
    )
    record = {"command": "c", "environment": {"device": "d"}, "rounds": 1, "shapes": {"few tokens": found}}
    assert page(record).count("| bit for bit |") == 4
