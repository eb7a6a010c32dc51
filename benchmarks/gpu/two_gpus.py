"""The steps for two GPUs with NCCL; a rehearsal has two gloo processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu.chrome_trace import ChromeTrace, Interval
from benchmarks.gpu.hidden import Bench
from benchmarks.gpu.launches import pair_of_budgets, profile_passes
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.pairs import finish
from benchmarks.gpu.setting import Setting, layer_shapes
from benchmarks.gpu.two_ranks import CASES, Case, wrong
from lab.distributed import run_distributed
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.process import device
from scmoe_ds.trace.recorder import SILENT, Recorder

RANKS = 2
CASE_LIMIT_S = 60.0
ORDER = {
    "forward": [("encode", "dispatch"), ("dispatch", "experts"), ("experts", "combine"), ("combine", "decode")],
    "backward": [("decode", "combine"), ("combine", "experts"), ("experts", "dispatch"), ("dispatch", "encode")],
}
"""What has to be over before what begins; dispatch and combine are in backward those of the gradients."""
EXCHANGES = {"forward": ["counts", "dispatch", "combine"], "backward": ["combine", "dispatch"]}
"""NCCL's kernels of a pass in one chunk, in their order."""


def cases(notes: Notes, setting: Setting) -> None:
    """The step: every case in processes of its own, so that one that hangs or crashes is one that is wrong."""
    right = 0
    for number, case in enumerate(CASES, start=1):
        problem = check(case, setting)
        right += problem is None
        notes.row("Two ranks", case=case.name, result=problem or "right")
        notes.number("two ranks: right", right)
        notes.number("two ranks: wrong", number - right)


def check(case: Case, setting: Setting) -> str | None:
    """What is wrong with a case on two ranks; None if nothing is."""
    try:
        found: str | None = run_distributed(wrong, RANKS, case, setting, timeout_s=CASE_LIMIT_S)[0]
    except Exception as error:  # of a rank, with its traceback
        return str(error).strip().splitlines()[-1]
    return found


def order(notes: Notes, setting: Setting) -> None:
    """The step: one pass forward and backward, from the profiler's kernels."""
    run_distributed(order_on_rank, RANKS, notes, setting)  # the first rank writes the notes


def order_on_rank(notes: Notes, setting: Setting) -> None:
    """On every rank; the first one notes what it has seen."""
    notes = notes if torch.distributed.get_rank() == 0 else Notes()
    torch.manual_seed(torch.distributed.get_rank())
    pair, hidden = pair_of_budgets(setting, 2 * RANKS, expert_parallel_size=RANKS)
    pair.schedule = Schedule(2)
    path = setting.file(f"_order_rank{torch.distributed.get_rank()}.json.gz")
    trace = profile_passes(pair, hidden, path)
    notes.file(path.name)
    problems = 0
    for phase in ORDER:
        found = from_trace(trace, phase) if trace.on_gpu else from_recorder(pair, hidden, phase)
        first = min((start for start, _ in found.values()), default=0.0)
        for name, (start, end) in sorted(found.items(), key=lambda each: each[1]):
            cells = {"phase": phase, "part": name, "start µs": f"{start - first:.0f}", "end µs": f"{end - first:.0f}"}
            notes.row("One pass of a pair on rank 0, one chunk", **cells)
        for problem in out_of_order(found, phase):
            problems += 1
            notes.row("Out of order", phase=phase, problem=problem)
    notes.number("operations out of order", problems)


def from_trace(trace: ChromeTrace, phase: str) -> dict[str, Interval]:
    """When each part's kernels ran, and NCCL's by their order."""
    parts = trace.parts(phase).items()
    found = {part.removesuffix(f", {phase}"): interval for part, interval in parts if part.endswith(f", {phase}")}
    kernels = trace.kernels("nccl", within=phase)
    names = EXCHANGES[phase]
    if len(kernels) == len(names):
        found |= {name: (each.start, each.end) for name, each in zip(names, kernels, strict=True)}
    return found


def from_recorder(pair: StagedPair, hidden: torch.Tensor, phase: str) -> dict[str, Interval]:
    """The same from the package's own recorder, in microseconds; a CPU's trace has no kernels."""
    recorder = Recorder(device())
    pair.recorder = recorder.pair(0)
    pair(hidden).hidden.float().sum().backward()
    pair.recorder = SILENT
    finish()
    spans = [span for span in recorder.spans() if span.phase == phase and span.lane != "wait"]
    return {span.name: (1e3 * span.start_ms, 1e3 * span.end_ms) for span in spans}


def out_of_order(found: dict[str, Interval], phase: str) -> Sequence[str]:
    """What began too early, or is missing."""
    problems = [f"no {name} seen" for name in dict.fromkeys(sum(ORDER[phase], ())) if name not in found]
    for first, second in ORDER[phase]:
        if first in found and second in found and found[second][0] < found[first][1]:
            late = found[first][1] - found[second][0]
            problems.append(f"{second} begins {late:.0f} µs before {first} is over")
    return problems


def hidden(notes: Notes, setting: Setting) -> None:
    """The step: the same three times as with a stand-in transfer, with the all-to-all."""
    run_distributed(hidden_on_rank, RANKS, notes, setting)  # the first rank writes the notes


def hidden_on_rank(notes: Notes, setting: Setting) -> None:
    """On every rank; the first one notes what all have measured together."""
    notes = notes if torch.distributed.get_rank() == 0 else Notes()
    torch.manual_seed(torch.distributed.get_rank())
    shares: list[float] = []
    beside: list[float] = []
    for index, shape in enumerate(layer_shapes(setting)):
        bench = Bench(shape, setting, RANKS)
        bench.calibrate()
        shares.append(bench.measure(notes, (RANKS - 1) / RANKS))
        notes.number("hidden share of the all-to-all", min(shares))
        beside += bench.trace(notes, f"_overlap_{index + 1}_rank{torch.distributed.get_rank()}.json.gz")
        if beside:
            notes.number("NCCL beside other kernels, from the trace", min(beside))
