"""Verdicts of benchmarks.quality.sparse, and thresholds of another spread without another calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality import sparse, sparse_table
from benchmarks.quality.sparse_subjects import thresholds_of
from benchmarks.redraw import drawing
from scmoe_ds.sparse.sparsity_file import Sparsity, curve_of, left_out

SHARES = {"dropped": 0.25, "skipped": 0.2, "halved": 0.1}


def compared(increase: float, other: float = 0.0) -> dict[str, float]:
    """256 sequences whose losses grow by that many percent, on average."""
    noise = np.random.default_rng(0).normal(0, 0.01, 256)
    whole = np.full(256, 4.0)
    return sparse._compared(4 * (1 + increase / 100) + noise, 4 * (1 + other / 100) + 0 * noise, whole)


def record(one: float, two: float) -> dict[str, Any]:
    """Of one model, with increases in percent."""
    rows: list[dict[str, Any]] = [{"measure": "abs-gate", "method": None, "rate": 0.0, **compared(0)}]
    for measure in ("abs-gate", "chance"):
        for rate, method, spread in sparse.configurations(measure):
            row = {"measure": measure, "method": method, "rate": rate, "spread": spread, **SHARES}
            row |= compared(one if method == "1t" else two)
            rows.append(row if method == "1t" else row | {"over_1t": compared(two, one)})
    model = {"title": "top-2", "loss": 4.0, "top_k": 2, "spread": 0.05, "major_share": [0.7], "rows": rows}
    facts = {"command": "c", "environment": {"device": "d"}, "corpus": "text", "tokens": 1, "sequences": 1}
    return {"benchmark": sparse.NAME, **facts, "calibration_tokens": 1, "models": {"top2": model}}


@pytest.mark.parametrize(
    ("one", "two", "verdicts"),
    [
        (1.0, 0.2, ["confirmed"] * 3),
        (1.0, 0.9, ["contradicted", "confirmed", "confirmed"]),
        (0.1, 0.9, ["contradicted"] * 3),
        (0.5, 0.5, ["within noise"] * 3),
    ],
)
def test_verdicts(one: float, two: float, verdicts: list[str]) -> None:
    text = sparse_table.markdown(record(one, two)).splitlines()
    claims = [line for line in text if line.startswith("| top-2 | 2T-Drop")]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in claims] == verdicts


def test_the_figure_is_drawn_again_from_the_record_with_the_speed_of_drops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = drawing(record(1.0, 0.2))
    assert draw is not None
    monkeypatch.setattr(sparse_table, "RESULTS", tmp_path)
    assert len(draw(record(1.0, 0.2)).axes) == 1
    rows = [{"row": "all rows", "shares": None}]
    rows += [{"row": "2T-Drop, 0.25", "shares": {"dropped": 0.24}, "layer_speedup": {"median": 1.25}}]
    speed = {"curve": {"layer": "ScMoE-2", "skew": 1.8, "rows": rows}}
    for share in (0.6, 0.15):
        path = tmp_path / f"drop_{100 * share:.0f}.json"
        path.write_text(json.dumps(speed | {"settings": {"share": share}}))
    _, below = draw(record(1.0, 0.2)).axes
    lines = below.get_lines()
    of_a_layer = "of a top-2 layer"
    labels = [f"ScMoE-2, 2T-Drop, all-to-all {share} {of_a_layer}" for share in ("15%", "60%")]
    assert [line.get_label() for line in lines] == labels
    for line in lines:
        assert line.get_xydata().tolist() == [[0, 1], [24, 0.8]]


def test_another_spread_needs_no_other_calibration() -> None:
    criterion = torch.rand(30000, generator=torch.Generator().manual_seed(0))
    known = {"gates": "g", "neurons": "n", "top_k": 2, "measure": "gate", "spread": 0.01, "tokens": 9}
    whole = Sparsity(**known, layers=(curve_of("a", criterion, 0.01),))
    ((skip, halve),) = thresholds_of(whole, 0.25, "2t", 0.1)
    assert halve - skip == pytest.approx(0.2)
    assert left_out(criterion, skip, halve) == pytest.approx(0.25, abs=0.003)
