"""The answers of `scmoe plan` as JSON, for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import scmoe_ds
from scmoe_ds.programs.plan_question import Question
from scmoe_ds.simulate.advice import shares
from scmoe_ds.simulate.answers import Answers
from scmoe_ds.simulate.rows import Row
from scmoe_ds.simulate.scaling import Point


def record(question: Question, found: Answers) -> dict[str, Any]:
    """All numbers: milliseconds, bytes, tokens (of image models samples), each with the interval that it is in."""
    return {
        "simulated": True,
        "scmoe_ds": scmoe_ds.__version__,
        "cluster": question.cluster.model_dump(),
        "profile": None if question.profile is None else question.profile.model_dump(),
        "model": question.model.model_dump(),
        "fixed": asdict(question.fixed),
        "tokens": question.tokens,
        "rows": [_row(each) for each in found.rows],
        "missing": found.search.missing,
        "recommendation": found.recommendation,
        "limit": found.limit,
        "break_even": [_without_infinity(asdict(each)) for each in found.break_even],
        "weak_scaling": _points(found.weak),
        "strong_scaling": _points(found.strong),
        "layouts": found.search.looked_at,
        "layouts_simulated": found.search.simulated,
    }


def _without_infinity(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has none: null is a factor without an end."""
    return {name: None if value == math.inf else value for name, value in values.items()}


def _row(row: Row) -> dict[str, Any]:
    intervals = ("step_ms", "tokens_per_second", "mfu", "exposed_ms", "exposed_share", "speedup", "gpu_hours", "cost")
    values = {name: getattr(row, name) for name in intervals}
    return {
        "method": asdict(row.run.method),
        "layout": asdict(row.run.layout),
        "memory_bytes": row.run.memory.total,
        **{name: None if value is None else asdict(value) for name, value in values.items()},
        "shares_of_a_step": shares(row.run),
    }


def _points(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [
        {
            "gpus": each.gpus,
            "batch": each.batch,
            "step_ms": {one.method.name: one.step.total_ms for one in each.runs},
            "layout": asdict(each.runs[-1].layout),
            "exposed_share": each.exposed_share,
            "efficiency": each.efficiency,
        }
        for each in points
    ]
