"""The acceptance run, without a GPU: every step rehearsed on the CPU, and every way in which a step can end."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import device_cases, hidden, page, process, stand_in, suites, targets, two_gpus, two_ranks
from benchmarks.gpu.acceptance import Acceptance, file_name
from benchmarks.gpu.chrome_trace import OUTSIDE, ChromeTrace, Event
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import ONE_GPU, STEPS, Step
from lab.distributed import run_distributed
from scmoe_ds.engine import connect
from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

BROKEN = "tests.benchmarks.broken_steps"


def setting_in(directory: Path) -> Setting:
    return Setting(True, str(directory), "record")


def in_this_process(
    function: str, setting: Mapping[str, Any], limit_s: float, directory: Path, environment: Mapping[str, str]
) -> process.Outcome:
    module, _, name = function.partition(":")
    notes = Notes(directory / "notes.json")
    getattr(importlib.import_module(module), name)(notes, Setting(**setting))
    assert Notes.read(directory / "notes.json").content() == notes.content()
    return process.Outcome("done", 1.0, notes)


# --- all steps, rehearsed


def test_rehearsal_of_one_gpu(tmp_path: Path) -> None:
    """The tests' own step runs pytest, which this is."""
    steps = [step for step in ONE_GPU if step.name != "tests"]
    record = Acceptance(steps, 1, setting_in(tmp_path), 8, in_this_process).run()
    assert [step["result"] for step in record["steps"]] == ["done"] * len(steps)
    by_name = {step["name"]: step for step in record["steps"]}
    assert all(step["tables"] for step in by_name.values())
    assert by_name["fp32"]["numbers"] == {"fp32: largest difference from the CPU": 0}
    assert by_name["launches"]["numbers"]["launches per pair, forward"] > 40
    assert by_name["offloading"]["numbers"]["offloading: texts that differ"] == 0
    assert json.loads((tmp_path / "record.json").read_text()) == record
    text = (tmp_path / "record.md").read_text()
    assert page.REHEARSAL in text
    measured = {number for step in by_name.values() for number in step["numbers"]}
    asked = {target.number for target in [*targets.ONE_GPU, *targets.budgets()]}
    assert asked - measured == {
        "copies beside kernels, from the trace",  # a CPU's trace has neither
        "tests/gpu: failed",
        "tests/gpu: passed",
    }
    for name in (file for step in by_name.values() for file in step["files"]):
        assert (tmp_path / name).is_file() and f"`{name}`" in text


def test_all_steps_exist() -> None:
    for step in (step for steps in STEPS.values() for step in steps):
        module, _, name = step.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


# --- how a step can end


@pytest.mark.parametrize(
    ("name", "limit_s", "result", "last_line"),
    [
        ("done", 20, "done", None),
        ("raises", 20, "failed with exit code 1", "ValueError: the second half is missing"),
        ("cuda_error", 20, "CUDA error", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("hangs", 2.4, "killed: it ran past its limit of 2 s", "waiting for a kernel that never ends"),
        ("is_killed", 20, "killed by SIGSEGV", "```` is no end of a code block"),
    ],
)
def test_outcomes(name: str, limit_s: float, result: str, last_line: str | None, tmp_path: Path) -> None:
    outcome = process.run(f"{BROKEN}:{name}", vars(setting_in(tmp_path)), limit_s, tmp_path, {"ANSWER": "42"})
    assert outcome.result == result
    assert last_line in outcome.last_lines if last_line else not outcome.last_lines
    if name == "done":
        assert outcome.notes.tables == {"Answers": [{"question": "life | and *all*", "answer": "42"}]}
    if name == "raises":
        assert outcome.notes.numbers == {"half": 1}
    if name == "hangs":
        assert any("in hangs" in line for line in outcome.last_lines), "the stack says where"
        assert not is_running(int(outcome.notes.numbers["child"]))


def is_running(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_the_next_step_runs_whatever_happened_to_the_last(tmp_path: Path) -> None:
    names = ["raises", "is_killed", "done"]
    steps = [Step(name, f"Does {name} end?", f"{BROKEN}:{name}", 20) for name in names]
    record = Acceptance(steps, 1, setting_in(tmp_path), 8).run()
    assert [step["result"] for step in record["steps"]] == ["failed with exit code 1", "killed by SIGSEGV", "done"]
    text = (tmp_path / "record.md").read_text()
    assert "ValueError: the second half is missing" in text
    assert "\n`````\n" in text, "the fence is longer than what a line begins with"
    assert "life &#124; and \\*all\\*" in text


def test_steps_that_do_not_fit_into_the_time_are_not_started(tmp_path: Path) -> None:
    steps = [Step("late", "Is it too late?", f"{BROKEN}:hangs", 20)]
    (late,) = Acceptance(steps, 1, setting_in(tmp_path), 0.01).run()["steps"]
    assert (late["result"], late["seconds"]) == ("not started: the time of the run is up", None)


def test_a_record_is_named_after_its_card() -> None:
    where = {"device": "NVIDIA A800-SXM4-80GB", "date": "2026-11-28"}
    assert file_name(2, where) == "gpu2_nvidia_a800_sxm4_80gb_2026-11-28"


# --- numbers and targets


def test_targets() -> None:
    share, worst = targets.Target("share", "at least", 0.7, "%"), targets.Target("worst", "at most", 1e-3, "nats")
    assert share.judge({"share": 0.7}) == {
        "number": "share", "target": "at least 70 %", "measured": "70 %", "met": "yes",
    }  # fmt: skip
    assert share.judge({"share": 0.699})["met"] == "no"
    assert worst.judge({"worst": 2e-3}) | {"number": ""} == {
        "number": "", "target": "at most 0.001 nats", "measured": "0.002 nats", "met": "no",
    }  # fmt: skip
    assert worst.judge({})["met"] == "not measured"


def test_what_is_not_finite_meets_no_target(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    notes.number("loss", float("nan"))
    assert (
        targets.Target("loss", "at most", 1).judge(Notes.read(tmp_path / "notes.json").numbers)["met"] == "not measured"
    )


def test_failed_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
    )
    notes = Notes()
    suites.run_tests(
        notes, [str(tmp_path), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)], tmp_path / "x.xml", 1
    )
    assert notes.numbers == {"tests/gpu: passed": 1, "tests/gpu: failed": 1}
    (failed,) = notes.tables["Tests that failed"]
    assert "test_bad" in failed["test"] and "no" in failed["message"]
    assert notes.tables["Tests that skipped themselves"] == [{"reason": "no GPU", "tests": 1}]


def test_a_fitting_transfer_takes_part_of_the_window_on_both_sides_of_the_experts() -> None:
    def both(ms: float) -> PassTimes:
        return PassTimes(forward_ms=ms, backward_ms=2 * ms)

    backbone = [
        OperatorTime(name=name, forward_ms=ms, backward_ms=2 * ms) for name, ms in [("a", 3), ("b", 2), ("c", 4)]
    ]
    chunk = ChunkTimes(dispatch=both(10), experts=both(5), combine=both(8))
    times = OperatorTimes(gate=both(1), encode=both(0), decode=both(1), backbone=tuple(backbone), chunks={1: chunk})
    assert hidden.fitting_share(times) == pytest.approx(0.6 * 4 / 10)  # 3 + 2 before the experts, 4 behind them


# --- a GPU's trace


def entry(kind: str, name: str, start: float, end: float, thread: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": arguments}


GPU_TRACE = [
    entry("user_annotation", "measured step", 100, 200),
    entry("user_annotation", "gate, forward", 100, 120),
    entry("cuda_runtime", "cudaLaunchKernel", 101, 102, correlation=1),
    entry("cuda_runtime", "cudaLaunchKernel", 103, 104, correlation=2),
    entry("cuda_driver", "cuLaunchKernelEx", 130, 131, correlation=3),
    entry("user_annotation", "gate, backward", 150, 160, thread=2),
    entry("cuda_runtime", "cudaLaunchKernelExC_v11060", 155, 156, thread=2, correlation=4),
    entry("cuda_runtime", "cudaLaunchKernel", 155, 156, thread=1, correlation=5),
    entry("cuda_runtime", "cudaEventSynchronize", 140, 145),
    entry("cuda_runtime", "cudaMemcpyAsync", 141, 142, correlation=6),
    entry("cuda_runtime", "cudaLaunchKernel", 300, 301, correlation=7),
    entry("cuda_runtime", "cudaDeviceSynchronize", 300, 310),
    entry("kernel", "gemm", 110, 130, correlation=1),
    entry("kernel", "gemm", 125, 150, correlation=2),
    entry("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 120, 160, correlation=6),
    entry("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 500, 600, correlation=8),
    entry("cpu_op", "aten::nonzero", 150, 151),
]


def test_a_trace_of_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": GPU_TRACE}).encode()))
    trace = ChromeTrace.read(path)
    assert trace.launches() == {"gate, forward": 2, OUTSIDE: 2, "gate, backward": 1}
    assert trace.host_waits() == {"cudaEventSynchronize": 1}
    assert trace.beside_kernels() == pytest.approx(30 / 40)  # a kernel runs up to 150, the copy from 120 to 160


def test_steps_start_without_torch() -> None:
    """A step that hangs at the import of a broken torch is killed like any other."""
    code = "import sys, benchmarks.gpu.process, benchmarks.gpu.setting, benchmarks.gpu.notes; sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, process.sys.executable, [process.sys.executable, "-c", code]) == 0


def test_a_sort_is_one_launch() -> None:
    """Its kernels are launched by one operator; a Triton kernel has none around it."""
    trace = [
        entry("user_annotation", "measured step", 0, 100),
        entry("cpu_op", "aten::argsort", 10, 30),
        entry("cpu_op", "aten::sort", 11, 29),
        *(entry("cuda_runtime", "cudaLaunchKernel", start, start + 1, correlation=start) for start in (12, 15, 18)),
        entry("cpu_op", "_FusedRestore", 40, 60),
        *(entry("cuda_driver", "cuLaunchKernel", start, start + 1, correlation=start) for start in (42, 45)),
        *(entry("kernel", "k", start + 50, start + 51, correlation=start) for start in (12, 15, 18, 42, 45)),
    ]
    read = ChromeTrace([events_of(each) for each in trace])
    assert read.launches() == {OUTSIDE: 3}
    assert len(read.kernels(within="measured step")) == 5


def events_of(each: dict[str, Any]) -> Event:
    return Event(each["cat"], each["name"], each["ts"], each["ts"] + each["dur"], each["tid"], each["args"])


def nccl_trace(starts: dict[str, tuple[float, float]]) -> ChromeTrace:
    """A forward pass whose parts ran at these times."""
    events, exchanges = [entry("user_annotation", "forward", 0, 50)], two_gpus.EXCHANGES["forward"]
    for number, (name, (start, end)) in enumerate(starts.items(), start=1):
        if name in exchanges:
            kernel = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
        else:
            events.append(entry("user_annotation", f"{name}, forward", number, number + 0.5))
            kernel = f"{name}_kernel"
        events.append(entry("cuda_runtime", "cudaLaunchKernel", number + 0.1, number + 0.2, correlation=number))
        events.append(entry("kernel", kernel, start, end, correlation=number))
    return ChromeTrace([events_of(each) for each in events])


IN_ORDER = {
    "gate": (100, 110),
    "counts": (110, 112),
    "encode": (110, 120),
    "dispatch": (121, 140),
    "mlp": (122, 150),
    "experts": (150, 160),
    "combine": (161, 180),
    "attention": (160, 185),
    "decode": (185, 190),
}


def test_order_of_nccls_kernels() -> None:
    found = two_gpus.from_trace(nccl_trace(IN_ORDER), "forward")
    assert found == IN_ORDER
    assert two_gpus.out_of_order(found, "forward") == []
    early = two_gpus.from_trace(nccl_trace(IN_ORDER | {"experts": (139, 160)}), "forward")
    assert two_gpus.out_of_order(early, "forward") == ["experts begins 1 µs before dispatch is over"]
    lost = two_gpus.from_trace(nccl_trace({k: v for k, v in IN_ORDER.items() if k != "combine"}), "forward")
    assert two_gpus.out_of_order(lost, "forward") == ["no dispatch seen", "no combine seen"]
    trace = nccl_trace(IN_ORDER)
    assert trace.beside_kernels(trace.kernels("nccl")) == pytest.approx((2 + 18 + 19) / (2 + 19 + 19))


# --- two ranks, and the simulated device


def rehearse(setting: Setting, notes: Notes) -> list[str | None]:
    """All steps of two GPUs but the killed rank (tests/distributed has gloo's) and the case that needs a new process."""
    found = [two_ranks.wrong(case, setting) for case in two_ranks.CASES if not case.alone]
    two_gpus.order_on_rank(notes, setting)
    two_gpus.hidden_on_rank(notes, setting)
    return found


def test_rehearsal_of_two_gpus(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    found, _ = run_distributed(rehearse, 2, setting_in(tmp_path), notes)
    assert found == [None] * (len(two_ranks.CASES) - 1)
    written = Notes.read(tmp_path / "notes.json")
    assert written.numbers["operations out of order"] == 0
    assert "hidden share of the all-to-all" in written.numbers
    parts = {(row["phase"], row["part"]) for row in written.tables["One pass of a pair on rank 0, one chunk"]}
    assert {(phase, name) for phase, names in two_gpus.EXCHANGES.items() for name in names} <= parts


def test_what_is_off_is_wrong() -> None:
    connect()
    case = two_ranks.Case("a half", lambda setting: 0.5, 0.4)
    assert two_ranks.wrong(case, Setting(True, "", "")) == "off by 5.0e-01; at most 4e-01"
    assert device_cases.off(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0])) == 0.25
    assert device_cases.off(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
    assert device_cases.off(torch.ones(2), None) == float("inf") and device_cases.off(None, None) == 0


@NEEDS_SIMULATION
def test_cases_on_the_simulated_device() -> None:
    """The stand-in transfer on its own stream: no race, no memory that is used too long, the CPU's numbers."""
    connect()
    cases = device_cases.cases()
    assert len(cases) > 50
    for case in itertools.islice(cases, 0, None, len(cases) // 8):
        with simulated_gpu() as gpu:
            assert device_cases.problem_of(case, torch.device("cuda", 0), gpu.move) is None, case
        assert gpu.findings == [], case


@NEEDS_SIMULATION
def test_a_race_of_the_stand_in_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one of the cases: the compute stream does not wait for the transfer."""
    connect()
    original = stand_in.StandIn.launch
    monkeypatch.setattr(stand_in.StandIn, "launch", lambda *args: original(*args) and (lambda: None))
    with simulated_gpu() as gpu:
        device_cases.problem_of(device_cases.cases()[0], torch.device("cuda", 0), gpu.move)
    assert any(finding.startswith("race") for finding in gpu.findings)
