"""Calibration files and times in checkpoints that are damaged or made up: one line, and a planner that ends."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.engine import connect
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.planner import plan as schedule
from scmoe_ds.planner import simulation
from scmoe_ds.planner.calibration_file import find_times, read_calibration, write_calibration
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from scmoe_ds.programs import analyze as analyze_program

ROOT = Path(__file__).resolve().parents[2]
GOOD = json.loads((ROOT / "benchmarks" / "results" / "analysis_times.json").read_text())
Change = Callable[[dict[str, Any]], Any]


def put(*keys_and_value: Any) -> Change:
    *parents, key, value = keys_and_value

    def change(times: Any) -> None:
        for parent in parents:
            times = times[parent]
        times[key] = value

    return change


def zeros(found: Any) -> None:
    for key, value in list(found.items()) if isinstance(found, dict) else enumerate(found):
        if isinstance(value, (dict, list)):
            zeros(value)
        elif str(key).endswith("_ms"):
            found[key] = 0.0


TIMES: dict[str, Change] = {
    "many chunks": lambda times: times["chunks"].update({"400": times["chunks"]["1"]}),
    "nine chunks": lambda times: times["chunks"].update({"9": times["chunks"]["1"]}),
    "no chunks": put("chunks", {"0": {}}),
    "negative chunks": lambda times: times["chunks"].update({"-1": times["chunks"]["1"]}),
    "no single chunk": lambda times: times["chunks"].pop("1"),
    "not all chunks": lambda times: times["chunks"].pop("4"),
    "chunks a list": put("chunks", []),
    "zeros": zeros,
    "negative": put("gate", "forward_ms", -1.0),
    "NaN": put("gate", "forward_ms", math.nan),
    "infinite": put("backbone", 0, "forward_ms", math.inf),
    "huge": put("backbone", 0, "forward_ms", 1e308),
    "text": put("gate", "forward_ms", "1.5"),
    "true": put("gate", "forward_ms", True),
    "null": put("gate", "forward_ms", None),
    "missing": lambda times: times.pop("decode"),
    "unknown": put("evil", 1),
    "other operators": put("backbone", 0, "name", "evil"),
    "an operator more": lambda times: times["backbone"].append(times["backbone"][0]),
    "a long backbone": lambda times: times["backbone"].extend(times["backbone"] * 1000),
    "no backbone": put("backbone", []),
    "backbone null": put("backbone", None),
}


@pytest.mark.parametrize("case", TIMES)
def test_times(case: str) -> None:
    saved = copy.deepcopy(GOOD)
    TIMES[case](saved[0]["times"])
    with pytest.raises(ScMoEConfigError) as caught:
        find_times(saved, [GOOD[0]["description"]], (1, 2, 4), "times.json")
    assert str(caught.value).startswith("times.json ") and "\n" not in str(caught.value)
    assert str(caught.value).endswith("Remove it to measure again, or name another")


@pytest.mark.parametrize(
    "saved",
    [
        None,
        {},
        3,
        "times",
        [],
        [3],
        [None],
        [{}],
        [{"description": []}],
        [{"description": {}}],
        [{"description": {"a\nb" * 100: "c\n" * 1000}}],
        [{"description": GOOD[0]["description"]}],
        [{"description": GOOD[0]["description"], "times": []}],
    ],
)
def test_entries(saved: Any) -> None:
    with pytest.raises(ScMoEConfigError) as caught:
        find_times(saved, [GOOD[0]["description"]], (1,), "the checkpoint's calibration")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3000


def test_good_times() -> None:
    (found,) = find_times(GOOD, [GOOD[0]["description"]], (1, 2, 4), "times.json")
    assert found.model_dump(mode="json") == GOOD[0]["times"]


def test_jobs_that_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job writes the same file, and is done, between this one's writing and its renaming."""
    connect()
    file, rename = tmp_path / "times.json", Path.replace
    own, others = GOOD, [*GOOD, *GOOD]

    def late(part: Path, target: Any) -> Path:
        monkeypatch.setattr(Path, "replace", rename)
        write_calibration(str(file), others)
        return part.replace(target)

    monkeypatch.setattr(Path, "replace", late)
    write_calibration(str(file), own)
    assert json.loads(file.read_text()) == own
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "{}", "[1]", json.dumps(GOOD)[:-40], "[" + "9" * 5000 + "]", "\ud800"]
)
def test_files(text: str, tmp_path: Path) -> None:
    connect()
    file = tmp_path / "times.json"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ScMoEConfigError, match=rf"^scmoe\.overlap\.calibration_file = {file}: ") as caught:
        read_calibration(str(file))
    assert "\n" not in str(caught.value)
    with pytest.raises(ScMoEConfigError, match="cannot be read"):
        read_calibration(str(tmp_path))


@pytest.mark.parametrize("case", ["many chunks", "zeros", "NaN", "a long backbone", "text"])
def test_feasibility(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = copy.deepcopy(GOOD)
    TIMES[case](saved[0]["times"])
    (tmp_path / "times.json").write_text(json.dumps(saved))
    similarity = str(ROOT / "benchmarks" / "results" / "analysis_similarity_scmoe.json")
    code = analyze_program.main(
        [
            "feasibility",
            "--similarity",
            similarity,
            "--calibration",
            str(tmp_path / "times.json"),
            "--output-prefix",
            str(tmp_path / "out"),
        ]
    )
    assert code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def long_backbone(operators: int) -> OperatorTimes:
    """Times without a pattern, and transfers of about half of all of them."""
    names = [("attention", "mlp")[number % 2] for number in range(operators)]
    backbone = tuple(
        OperatorTime(name=name, forward_ms=1 + number * 7 % 5, backward_ms=1 + number * 3 % 7)
        for number, name in enumerate(names)
    )
    travel = float(sum(each.forward_ms for each in backbone)) / 2

    def part(ms: float) -> PassTimes:
        return PassTimes(forward_ms=ms, backward_ms=ms)

    chunks = {
        count: ChunkTimes(dispatch=part(travel / count), experts=part(20 / count), combine=part(travel / count))
        for count in (1, 2, 4, 8)
    }
    return OperatorTimes(gate=part(0), encode=part(0), decode=part(0), backbone=backbone, chunks=chunks)


def test_the_planner_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight chunks around a hundred operators have 3.5e11 schedules."""
    simulated, original = [], simulation._one_pass
    monkeypatch.setattr(
        simulation, "_one_pass", lambda program, *rest: simulated.append(len(program)) or original(program, *rest)
    )  # type: ignore[func-returns-value]
    times = long_backbone(100)
    found = plan(times)
    assert sum(simulated) < 2 * 4 * schedule.MOST_EVENTS
    assert len(found.unchunked) == 101, "one chunk is tried at every slot"
    assert found.predicted.total_ms <= min(costs.total_ms for _, costs in found.unchunked)
    for count, limit in ((4, 19), (8, 8)):
        tried = schedule._slots_to_try(times, count)
        assert len(tried) == limit and tried[0] == 1 and tried[-1] == 101


def test_short_backbones_are_tried_in_full() -> None:
    for operators, count in itertools.product((1, 3, 5, 8), (1, 2, 4, 8)):
        assert schedule._slots_to_try(long_backbone(operators), count) == list(range(1, operators + 2))
