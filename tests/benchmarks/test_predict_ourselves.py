"""The committed predictions of our own rows are what the package predicts today, and as near to the measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.predict.ourselves import predicted_in, summary

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["plan_ourselves", "plan_ourselves_4_nodes"])
def test_predictions_of_own_rows_are_as_recorded(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    found = predicted_in(record)
    assert [each.ms for each in found] == pytest.approx([row["simulated_ms"] for row in record["rows"]], rel=0.03)
    assert [each.row.ms.median for each in found] == [row["measured_ms"] for row in record["rows"]]
    today, recorded = summary(found), record["summary"]
    assert today["median_error"] <= 0.07 and today["worst_error"] <= recorded["worst_error"] + 0.03
