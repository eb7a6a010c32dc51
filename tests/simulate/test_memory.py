"""The bytes of a rank, against what `scmoe check` found in the same trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.predict.memory import predicted
from benchmarks.predict.memory_cases import Case, cases
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.memory import memory_of
from scmoe_ds.simulate.method import SCMOE

RECORD = json.loads((Path(__file__).parents[2] / "benchmarks/results/plan_memory.json").read_text("utf-8"))
FOUND = {row["case"]: row["check"] for row in RECORD["rows"]}


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_memory_is_what_scmoe_check_found(case: Case) -> None:
    formula, found = predicted(case), FOUND[case.name]
    assert formula["parameters"] == found["parameters"]
    assert formula["tensors"] == pytest.approx(found["peak"], rel=0.05)


def test_more_ranks_need_no_more_memory() -> None:
    model = model_of_preset("gpt2-moe-medium")
    totals = {
        stage: [
            memory_of(model, SCMOE[1], Layout(world, 8, accumulation=2, zero_stage=stage, reduce_bucket=1000)).total
            for world in (8, 16, 64)
        ]
        for stage in (0, 1, 2, 3)
    }
    assert all(each == sorted(each, reverse=True) for each in totals.values())
    for fewer, more in zip(totals.values(), list(totals.values())[1:], strict=False):
        assert all(less <= than for less, than in zip(more, fewer, strict=True))
