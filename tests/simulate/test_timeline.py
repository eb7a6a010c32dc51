"""A simulated step as text, as JSON, and as the spans that a recorder would have seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.programs.plan_timeline import recorded, save_simulated
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.step import Step, run_step
from scmoe_ds.simulate.timeline import timeline, timeline_lines
from scmoe_ds.trace.spans import hidden_share
from tests.simulate.test_step import operators, pairs_of, step_of


def step(schedule: Schedule) -> Step:
    times = step_of(pairs_of(operators(), 4, reduce_ms=7.0), outside_reduce_ms=2.0, optimizer_ms=3.0)
    return run_step(times, Layout(8, 8, overlap_comm=True), spans=True, schedules=[schedule])


def test_lanes_as_text() -> None:
    """Forward 16.6: before 3, gate and encode 0.4, mlp 2, 3 of the dispatch exposed, experts 3, attention 3, shared 2."""
    lines = timeline_lines(step(Schedule(2)), columns=18 + 166)  # ten columns are a millisecond
    assert lines[:2] == ["pair 3 of 4, like 3 others", "  forward, 16.60 ms"]
    compute, communication = (line[18:] for line in lines[2:4])
    assert compute[34:54] == "[-------mlp--------]"
    assert compute[54:84] == f"[{'/' * 28}]"
    assert compute[84:114] == f"[{'experts':-^28}]"
    assert communication[34:84] == f"[{'dispatch':-^48}]"
    assert communication[114:164] == f"[{'combine':-^48}]"
    assert "behind all pairs" in lines and "simulated" in lines[-1]
    assert any(line.lstrip().startswith("reduction") for line in lines)
    assert max(map(len, lines)) <= 18 + 166


def test_a_recorder_would_have_seen_the_same_hidden_share(tmp_path: Path) -> None:
    for schedule in (Schedule(2), Schedule((2, 3), 2), Schedule(1, overlap=False)):
        simulated = step(schedule)
        found = hidden_share(recorded(simulated, simulated.busiest))
        assert found.share == pytest.approx(simulated.hidden_share, abs=1e-9)
        assert found.communication_ms == pytest.approx(simulated.communication_ms)
    assert {span.chunk for span in recorded(step(Schedule((2, 3), 2)), 0)} == {0, 1}
    save_simulated(simulated, tmp_path / "step.json", "serial")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    assert {event["args"]["layer"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}
    assert json.loads(json.dumps(timeline(simulated)))[0]["lane"] == "compute"
