"""Files of measured steps, as people have them, and the sentences for those that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.measured_steps import read_measured

START = {"kind": "start", "iteration": 0, "ranks": 16, "expert_parallel": 8, "micro_batch_size": 4, "precision": "bf16"}


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def run(tmp_path: Path, seconds: list[float], **more: object) -> Path:
    entries = [
        START,
        *({"kind": "step", "iteration": 10 * n, "seconds_per_iteration": s, **more} for n, s in enumerate(seconds, 1)),
    ]
    return written(tmp_path / "log.jsonl", "\n".join(map(json.dumps, entries)))


def test_a_run_has_its_own_layout_and_no_warm_up(tmp_path: Path) -> None:
    (row,) = read_measured(run(tmp_path, [9.0, 1.0, 1.1, 1.2, 1.1], exposed_ms=25.0).parent)
    assert row.parts(1, 1) == {"total": 1100.0, "exposed": 25.0}
    assert row.layout == {"world": 16, "expert_parallel": 8, "micro_batch": 4, "precision": "bf16"}
    assert 0 < row.spread < 0.1


@pytest.mark.parametrize(
    ("line", "ms"),
    [
        (" iteration        {n}/     100 | elapsed time per iteration (ms): {v} | learning rate: 1.0E-4 |", 1234.5),
        (
            "iter {n:3d}/100  loss 5.789  lr 0  grad 13.48  {v} tok/s  0.04 TFLOP/s  0.7 GiB  left 3m",
            1e3 * 8 * 64 / 1234.5,
        ),
        ("iter {n:3d}/100  loss 5.789  lr 0  grad 13.48  1.2345k img/s  0.04 TFLOP/s  0.7 GiB", 1e3 * 8 / 1234.5),
        (
            "epoch=0/micro_step={n}/global_step={n}, RunningAvgSamplesPerSec=1.0, CurrSamplesPerSec={v}, MemAllocated=1GB",
            1e3 * 8 / 1234.5,
        ),
    ],
)
def test_lines_of_logs(tmp_path: Path, line: str, ms: float) -> None:
    slow_start = [line.format(n=n, v=1.0 if n < 3 else 1234.5) for n in range(10)]
    (row,) = read_measured(written(tmp_path / "out.log", "node0: " + "\nnode0: ".join(slow_start)))
    assert row.parts(samples=8, tokens=64) == {"total": pytest.approx(ms)}


def test_tables_say_what_differs(tmp_path: Path) -> None:
    text = "name, step_ms, exposed_ms, micro_batch, recompute, method\na, 800, 50, 2, true, AutoEP\nb,1500,,4,,\n"
    first, second = read_measured(written(tmp_path / "steps.csv", text))
    assert first.parts(1, 1) == {"total": 800.0, "exposed": 50.0} and first.method == "AutoEP"
    assert first.layout == {"micro_batch": 2, "recompute": True} and second.layout == {"micro_batch": 4}
    rows = [{"tokens_per_second": 1e4, "zero_stage": 0}]
    for content in (rows, {"steps": rows}):
        (row,) = read_measured(written(tmp_path / "steps.json", json.dumps(content)))
        assert row.parts(10, 100)["total"] == 100.0 and row.layout == {"zero_stage": 0}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "step_ms\n", "has no steps"),
        ("a.json", "{}", "has no steps"),
        ("a.json", "[", "correct the file"),
        ("a.log", "nothing to see", "no steps in it"),
        ("log.jsonl", "", "no step behind the first 3 iterations"),
        ("a.csv", "steps_ms\n5\n", "row 1: steps_ms: no such column; did you mean step_ms?"),
        ("a.csv", "step_ms\n0\n", "row 1: step_ms = 0: no step takes that"),
        ("a.csv", "step_ms\nnan\n", "row 1: step_ms = nan: no step takes that"),
        ("a.csv", "step_ms\n1e-300\n", "row 1: step_ms = 1e-300: no step takes that"),
        ("a.csv", "step_ms,exposed_ms\n5,9\n", "row 1: exposed_ms = 9: is longer than step_ms"),
        ("a.csv", "step_ms,zero_stage\n5,9\n", "row 1: zero_stage = 9: must be 0, 1, 2 or 3"),
        ("a.json", "[" * 100_000, "a.json: is nested too deeply"),
        ("a.csv", "step_ms\n5 ms\n", "row 1: step_ms = 5 ms: must be a number"),
        ("a.csv", "micro_batch\n5\n", "row 1: has no step_ms"),
        ("a.csv", "step_ms,micro_batch\n5,0\n", "micro_batch = 0: must be positive"),
        ("a.csv", "step_ms,micro_batch\n5,two\n", "micro_batch = two: must be a whole number"),
        ("a.csv", "step_ms,recompute\n5,perhaps\n", "recompute = perhaps: must be true or false"),
    ],
)
def test_what_is_no_file_of_steps(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message.replace("?", "\\?")):
        read_measured(written(tmp_path / name, text))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"a directory without log\.jsonl"):
        read_measured(tmp_path)
    with pytest.raises(ArgumentError, match="not there"):
        read_measured(tmp_path / "a.csv")
