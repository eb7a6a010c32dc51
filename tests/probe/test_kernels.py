"""What one rank measures, on the CPU and on the simulated GPU, and the profile that follows from times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from scmoe_ds.compat import forget_process_groups
from scmoe_ds.probe import measure as measuring
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.beside import mean_of
from scmoe_ds.probe.clock import ColdClock
from scmoe_ds.probe.collectives import last_to_come
from scmoe_ds.probe.groups import layouts
from scmoe_ds.probe.results import profile_of
from scmoe_ds.probe.text import table
from scmoe_ds.probe.trials import Beside, Computed, Copy, Launch, Sent, Trial, climb, in_turns
from scmoe_ds.programs import probe
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.work import Kind
from tests.probe.small import SMALL
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu


def test_a_climb_leaves_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("scmoe_ds.probe.trials.time.perf_counter", lambda: now)

    def trial(name: int, *ms: float) -> Trial[Any]:
        times = list(ms)

        def sample() -> float:
            nonlocal now
            now += 1e-3 * (times.pop(0) if len(times) > 1 else times[0])
            return times[0]

        return Trial(Copy(name), sample)

    busy = [trial(1, 300, 1), trial(2, 10), trial(3, 90), trial(4, 1)]  # the first use of it took long
    slow = [trial(5, 200), trial(6, 1)]
    assert [each.what.bytes for each in climb([busy, slow], longest_ms=100)] == [1, 2, 3, 5]


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("scmoe_ds.probe.trials.time.perf_counter", lambda: now)
    order: list[int] = []

    def sample(name: int) -> float:
        nonlocal now
        now += 0.5
        order.append(name)
        return float(name)

    trials = [Trial(Copy(name), lambda name=name: sample(name)) for name in (1, 2)]
    found = in_turns(trials, seconds=3.5, rounds=(2, 4))
    assert found == {Copy(1): [1.0] * 3, Copy(2): [2.0] * 3}
    assert order == [1, 2, 1, 2, 2, 1]  # another one begins
    assert len(in_turns(trials, seconds=0.0, rounds=(2, 4))[Copy(1)]) == 2


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("aaaa", [(2, 1, ((0, 1), (2, 3))), (4, 1, ((0, 1, 2, 3),))]),
        ("ab", [(2, 2, ((0, 1),))]),
        ("aabb", [(2, 1, ((0, 1), (2, 3))), (2, 2, ((0, 2),)), (4, 2, ((0, 1, 2, 3),))]),
        ("abc", [(2, 2, ((0, 1),)), (3, 3, ((0, 1, 2),))]),
        ("aab", [(3, 2, ((0, 1, 2),))]),
        ("abab", [(4, 2, ((0, 1, 2, 3),))]),
    ],
)
def test_groups_inside_and_between_nodes(nodes: str, expected: list[Any]) -> None:
    assert layouts(nodes) == expected


def test_ranks_that_stand_still_count_for_nothing() -> None:
    members = ((0, 2), (4, 6))
    assert last_to_come(members)([5.0, 99.0, 3.0, 99.0, 7.0, 99.0, 8.0, 99.0]) == 7.0  # the slower pair's later rank
    assert mean_of(members)([0.1, 0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0]) == pytest.approx(0.25)


def known() -> dict[Any, list[float]]:
    """Times of a machine of 100 GFLOP/s and 10 GB/s."""
    shape = (10, 100, 1000)
    return {
        Copy(10**6): [0.1],
        Copy(10**8): [20.0, 20.0, 20.0],
        Launch("forward"): [0.002],
        Launch("backward"): [0.004],
        Computed("product", (shape,), "forward", "fp32", 2e6, 0.0): [0.04, 0.04, 0.05],
        Computed("product", ((1000, 100, 1000),), "forward", "fp32", 2e8, 0.0): [2.0],
        Computed("rows", ((1000, 1, 1),), None, "fp32", 0.0, 1000.0): [0.001],
        Sent("all-to-all", "collective", 2, 2, 1000): [1.0],
        Sent("all-to-all", "collective", 2, 2, 9000): [3.0],
        Sent("all-to-all", "send_receive", 2, 2, 1000): [2.0],
        Sent("all-reduce", "", 2, 2, 9000): [4.0, 5.0, 6.0],
        Sent("all-reduce", "", 2, 2, 1000): [1.0, 3.0, 9.0],
        Sent("counts", "", 2, 2, 2048): [0.25],
        Beside("collective", 2, 2, 1000): [-0.1],
        Beside("collective", 2, 2, 9000): [1 / 3],
        Beside("send_receive", 2, 2, 1000): [2 / 3],
    }


MACHINE: dict[str, Any] = {"device": "a CPU", "memory": 1e9, "nodes": 2}


def test_a_profile_follows_from_times() -> None:
    profile = profile_of(known(), **MACHINE)
    assert profile.peak == {"fp32": pytest.approx(1e11)}
    assert (profile.bandwidth, profile.launch) == (pytest.approx(1e10), pytest.approx(3e-6))
    shares = {(each.kind, each.shape): each.share for each in profile.table}
    assert shares[("product", (10, 100, 1000))] == pytest.approx(0.5)
    assert shares[("rows", (1000, 1, 1))] == pytest.approx(0.1)
    curves = {(each.collective, each.method): each for each in profile.collectives}
    assert set(curves) == {("all-to-all", "collective"), ("all-reduce", "")}
    assert curves["all-to-all", "collective"].ms == ((1000, 1.0), (9000, 3.0))
    assert curves["all-reduce", ""].ms == ((1000, 3.0), (9000, 5.0))
    assert curves["all-reduce", ""].spread == pytest.approx(0.2)
    assert [each.method for each in profile.other_methods] == ["send_receive"]
    assert profile.counts == pytest.approx(2.5e-4)
    assert profile.slowed_by == pytest.approx(1.5)  # of the largest message
    assert profile.with_method("send_receive").slowed_by == pytest.approx(3.0)
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_a_method_wins_by_a_tenth() -> None:
    times = known()
    for ms, method in ((0.95, "collective"), (0.85, "send_receive")):
        times[Sent("all-to-all", "send_receive", 2, 2, 1000)] = [ms]
        used = profile_of(times, **MACHINE).collectives
        assert [each.method for each in used if each.collective == "all-to-all"] == [method]


def test_the_table_names_what_it_shows() -> None:
    text = "\n".join(table(profile_of(known(), **MACHINE)))
    for part in ("100.0 GFLOP/s", "10 GB/s", "2 ranks on 2 nodes", "all-to-all (send_receive) -", "1.50 times as long"):
        assert part in text, text
    alone = {what: times for what, times in known().items() if not isinstance(what, (Sent, Beside))}
    assert "one rank: nothing is sent" in "\n".join(table(profile_of(alone, **MACHINE)))


def test_one_process_writes_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "measure", lambda seconds, names: measuring.measure(seconds, names, SMALL))
    file = tmp_path / "profile.json"
    try:
        assert probe.main(["--output", str(file), "--details"]) == 0
    finally:
        forget_process_groups()
    profile = Profile.model_validate_json(file.read_text())
    assert {each.kind for each in profile.table} == set(get_args(Kind))
    assert {each.phase for each in profile.table if each.kind == "attention"} == {"forward", "backward"}
    assert (profile.nodes, profile.gpus_per_node, profile.collectives) == (1, 1, ())
    out = capsys.readouterr().out
    assert "one rank: nothing is sent" in out and f"written to {file}" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seconds", "0"], "--seconds 0: must be from 1 to 3600"),
        (["--seconds", "nan"], "--seconds nan: must be from 1 to 3600"),
        (["--output", "/nowhere/p.json"], "No such file or directory"),
        (["--precision", "fp8"], "--precision fp8: must be one of fp32, bf16, fp16"),
    ],
)
def test_mistakes_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = probe.main(flags)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        forget_process_groups()
    assert code == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_little_memory_gets_small_tensors() -> None:
    clock = ColdClock(torch.device("cpu"), SMALL.evicted)
    whole, little = (Bench(clock, "fp32", most, SMALL) for most in (1 << 20, 1 << 11))
    largest = [max(max(each.shapes[0]) for each in shown(bench)) for bench in (whole, little)]
    assert largest[0] > largest[1]
    assert {"product", "attention", "pointwise", "reduction"} <= {each.kind for each in shown(little)}


def shown(bench: Bench) -> list[Computed]:
    """The kernels that are timed in so much memory; none of them runs."""
    ladders = measuring.ladders(bench.clock, [bench], [])
    return [trial.what for ladder in ladders for trial in ladder if isinstance(trial.what, Computed)]


@NEEDS_SIMULATION
def test_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scmoe_ds.probe.clock.keep_gpu_busy", lambda cycles: None)
    monkeypatch.setattr(Bench, "place", lambda bench, module: gpu.move(module.to(bench.dtype)))
    with simulated_gpu() as gpu:
        clock = ColdClock(torch.device("cuda", 0), SMALL.evicted)
        bench = Bench(clock, "bf16", 1 << 20, SMALL)
        trials = climb(measuring.ladders(clock, [bench], []), longest_ms=1e6)
        samples = in_turns(trials, 0.0, (1, 1))
    assert gpu.findings == []
    assert {each.kind for each in samples if isinstance(each, Computed)} == set(get_args(Kind))
    assert json.dumps(profile_of(samples, **MACHINE).model_dump(mode="json"))
