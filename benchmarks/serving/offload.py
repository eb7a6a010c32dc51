"""Experts outside of the memory: what one token costs in time and memory, resident, fetched late, fetched early.

    python -m benchmarks.serving.offload --shape medium --output benchmarks/results

A model of random weights is written as an export, then a process with resident and one with offloaded experts load it
and generate token by token (one sequence; every token needs one of eight experts in each MoE layer). The rows take
turns, a few tokens each, in rotating order. A ratio is taken within a round, and the median of the rounds is reported
with its 10th and 90th percentile. Latency is that of the blocks, per pair: embedding and vocabulary are left out.

All offloaded rows share a process. The rate at which direct reads fill a buffer depends on which memory it is: it
differed between processes by a factor of two, and within one by less than 5 %.

Experts come from a file past the page cache (O_DIRECT), or on a machine with a GPU from pinned host memory. Memory is
the highest resident set of a process (VmHWM), loading included; on a GPU the most that torch has allocated there.

What can be hidden of a migration is the window, which the backbone computes between tap and join. It is measured in the
resident row; the migration is what the blocking row waits for an expert.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import environment
from benchmarks.harness.on_nodes import write
from benchmarks.serving.figures import latencies
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.checkpoint.description import describe_model
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import offload_experts
from scmoe_ds.inference.pregate import guess_experts
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.offload.store import ExpertStore
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.trace.recorder import SILENT, Recorder

SHAPES = {
    "medium": (GPTSettings(24, 1024, 16, 50304, 2048), "GPT2-MoE-Medium with 8 experts, 24 layers"),
    "xl": (GPTSettings(12, 2048, 32, 50304, 2048), "GPT3-MoE-XL cut to 12 of its 24 layers"),
    "tiny": (GPTSettings(4, 64, 4, 512, 128), "a tiny model, to try the program"),
}
MODES = ("resident", "offload", "offload-async")
GUESSED = "offload-async, guessed"
PROMPT = list(range(1, 9))


def write_model(shape: str, architecture: str, position: str, dtype: str, out: Path) -> None:
    """An export of random weights, one parameter in memory at a time."""
    settings = SHAPES[shape][0]
    section = {"architecture": architecture, "position": position, "num_experts": 8}
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    with torch.device("meta"):
        model = GPT(settings, config)

    def reader(name: str, like: Tensor) -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        if like.ndim == 1:
            return lambda: torch.full(like.shape, float("norm" in name and name.endswith("weight")))
        # Gates of this scale choose evenly and not by a hair.
        scale = 0.5 if name.endswith("gate.wg.weight") else 0.02
        return lambda: torch.empty(like.shape).normal_(0.0, scale, generator=generator)

    weights = [(name, reader(name, parameter)) for name, parameter in sorted(model.named_parameters())]
    write_weights(out, weights, describe_model(settings, config), DTYPES[dtype], 2 * 10**9)


class Worker:
    """A model, resident or offloaded, in a process of its own."""

    def __init__(self, flags: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        trained = TrainedModel.open(flags["path"], contents=False)
        dtype = DTYPES[flags["dtype"]]
        stores: list[ExpertStore] = []

        def offload(model: GPT) -> None:
            stores.append(offload_experts(model, trained, "offload-async", flags["places"], dtype, device))

        config = serving_config(trained.config)
        model = load_model(trained, config, dtype, device, offload if flags["offloaded"] else None)
        self.store = stores[0] if stores else None
        self.generator, self.device, self.pairs = TextGenerator(model, batch_size=1), device, len(model.runs)
        self.model = model
        self._entered, self._passes = 0.0, [0.0]
        model.runs[0].register_forward_pre_hook(lambda *_: self._enter())
        model.runs[-1].register_forward_hook(lambda *_: self._leave())

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _enter(self) -> None:
        self._entered = self._clock()

    def _leave(self) -> None:
        self._passes.append(self._clock() - self._entered)

    def turn(self, mode: str, tokens: int, seed: int) -> dict[str, Any]:
        """Generates, and tells the median milliseconds of a pair in a decode step, and what the store did."""
        hooks = guess_experts(self.model) if mode == GUESSED else []
        before = vars(self.store.counts).copy() if self.store else {}
        for run in self.model.scheduled_pairs():
            if self.store:
                run.layer.deepspeed_moe.experts.early = mode != "offload"
        self._passes = []
        request = Request(tokens + 1, Sampling(1.0, seed=seed))
        (completion,) = self.generator.generate([PROMPT], request)
        for hook in hooks:
            hook.remove()
        milliseconds = 1e3 * statistics.median(self._passes[1:]) / self.pairs  # the first is the prefill
        counts = {name: value - before[name] for name, value in vars(self.store.counts).items()} if self.store else {}
        return {"pair_ms": milliseconds, "tokens": completion.tokens, "counts": counts}

    def window_ms(self) -> float:
        """What the backbone of a pair computes between tap and join in a decode step: the median of all."""
        runs = self.model.scheduled_pairs()
        names = {index: {operator.label for operator in backbone(run)} for index, run in enumerate(runs)}
        recorder = Recorder(self.device)
        for index, run in enumerate(runs):
            run.recorder = recorder.pair(index)
        self.turn("resident", 8, 0)
        for run in runs:
            run.recorder = SILENT
        windows = [0.0] * len(runs) * 9  # the prompt, and eight tokens
        seen = [Counter[str]() for _ in runs]
        for span in recorder.spans():
            if span.name in names[span.layer]:
                windows[span.layer * 9 + seen[span.layer][span.name]] += span.duration_ms
                seen[span.layer][span.name] += 1
        return statistics.median(value for number, value in enumerate(windows) if number % 9)

    def totals(self) -> dict[str, Any]:
        """Memory of the whole process; of the resident one, what a migration can hide behind."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            status = Path("/proc/self/status").read_text()
            peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        return {"peak_bytes": peak, "window_ms": self.window_ms() if not self.store else None}


def work(flags: dict[str, Any]) -> None:
    """Serves turns that are asked for on the standard input, one JSON object a line."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        worker = Worker(flags)
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            answer = worker.totals() if order is None else worker.turn(**order)
            print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A worker, from outside."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.offload", "--worker", json.dumps(flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def ask(self, order: dict[str, Any] | None) -> dict[str, Any]:
        """The answer to one order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return dict(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise RuntimeError("a row's process has ended; see above")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class SameProcess:
    """A worker in this process: no import to wait for, and memory that says nothing."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self._worker = Worker(flags)

    def ask(self, order: dict[str, Any] | None) -> dict[str, Any]:
        """As `Process.ask`."""
        return self._worker.totals() if order is None else self._worker.turn(**order)

    def close(self) -> None:
        """As `Process.close`."""


@contextlib.contextmanager
def started(flags: dict[str, Any], in_process: bool) -> Iterator[dict[bool, Process | SameProcess]]:
    """The resident and the offloaded process, one after the other loaded."""
    running: dict[bool, Process | SameProcess] = {}
    try:
        for offloaded in (False, True):
            kind = SameProcess if in_process else Process
            running[offloaded] = kind({**flags, "offloaded": offloaded})
        yield running
    finally:
        for process in running.values():
            process.close()


def measure(
    flags: dict[str, Any], modes: Sequence[str], rounds: int, tokens: int, in_process: bool = False
) -> dict[str, Any]:
    """Milliseconds per pair of every mode in every round, its text and counts, and both processes' memory.

    Args:
        in_process: load both models into this process, to try the program.
    """
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    texts: dict[str, list[Any]] = {mode: [] for mode in modes}
    counts: dict[str, Counter[str]] = {mode: Counter() for mode in modes}
    with started(flags, in_process) as running:
        for number in range(-1, rounds):
            shift = number % len(modes)
            for mode in [*modes[shift:], *modes[:shift]]:
                answer = running[mode != "resident"].ask({"mode": mode, "tokens": tokens, "seed": number})
                texts[mode].append(answer["tokens"])
                if number >= 0:
                    times[mode].append(answer["pair_ms"])
                    counts[mode].update(answer["counts"])
        totals = {mode: running[mode != "resident"].ask(None) for mode in ("resident", "offload")}
    return {"times": times, "texts": texts, "counts": counts, "totals": totals}


def table(found: dict[str, Any], family: str) -> list[dict[str, Any]]:
    """One entry per mode; all compute the same, and resident is what they are compared with."""
    times, totals, texts, counts = found["times"], found["totals"], found["texts"], found["counts"]
    resident, late = times["resident"], times["offload"]
    window, blocking = totals["resident"]["window_ms"], counts["offload"]
    migration = 1e3 * blocking["waited_s"] / blocking["migrations"]
    entries = []
    for mode, own in times.items():
        extra = [100 * (mine / base - 1) for mine, base in zip(own, resident, strict=True)]
        removed = [
            100 * (1 - (mine - base) / (slow - base)) for mine, base, slow in zip(own, resident, late, strict=True)
        ]
        peak = totals["resident" if mode == "resident" else "offload"]["peak_bytes"]
        entries.append(
            {
                "row": f"{family} {mode}",
                "pair_ms": vars(Spread.of(own)),
                "extra_percent": vars(Spread.of(extra)),
                "removed_percent": vars(Spread.of(removed)) if mode not in ("resident", "offload") else None,
                "peak_bytes": peak,
                "memory_of_resident": peak / totals["resident"]["peak_bytes"],
                "window_ms": window,
                "migration_ms": migration,
                "counts": dict(counts[mode]),
                "same_text": texts[mode] == texts["resident"],
            }
        )
    return entries


def markdown(record: dict[str, Any]) -> str:
    """The table as a person reads it."""

    def spread(value: dict[str, float] | None, digits: int) -> str:
        if value is None:
            return "–"
        return f"{value['median']:.{digits}f} ({value['p10']:.{digits}f}–{value['p90']:.{digits}f})"

    where = record["environment"]
    lines = [
        f"# Experts from {record['tier']}: {escape(record['model'])}, one token at a time",
        "",
        f"{code(record['command'])}, {where['date']}, {where['device']}, torch {where['torch']}, commit "
        f"{where['commit']}; {record['dtype']} ({record['file_dtype']} in the file), {record['rounds']} rounds of "
        f"{record['tokens']} tokens; room for {record['places']} experts (top-2: twice as many).",
        "",
        "| | ms per pair of blocks | against resident, % | of offload's extra time removed, %; window / "
        "migration | peak memory, GB | of resident | experts used / found there / migrated / guessed / "
        "guessed right | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in record["rows"]:
        counts = entry["counts"]
        most = 100 * min(1, entry["window_ms"] / entry["migration_ms"])
        limit = f"; {entry['window_ms']:.1f} / {entry['migration_ms']:.1f} ms = {most:.0f} %" * bool(
            entry["removed_percent"]
        )
        names = ("used", "hits", "migrations", "predicted", "confirmed")
        used = " / ".join(str(counts[name]) for name in names) if counts else "–"
        lines.append(
            f"| {escape(entry['row'])} | {spread(entry['pair_ms'], 2)} | {spread(entry['extra_percent'], 0)} | "
            f"{spread(entry['removed_percent'], 0)}{limit} | {entry['peak_bytes'] / 1e9:.2f} | "
            f"{entry['memory_of_resident']:.2f} | {used} | {'yes' if entry['same_text'] else 'NO'} |"
        )
    return "\n".join(lines) + "\n"


def models(args: argparse.Namespace, file_dtype: str) -> Iterator[tuple[str, bool, Path]]:
    """The rows' name, whether it is a standard MoE, and an export of it; one at a time, several would not fit."""
    for path in map(Path, args.exports):
        architecture = TrainedModel.open(path, contents=False).config.architecture
        yield architecture, architecture == "topk", path
    families = [("ScMoE " + position, "scmoe", position) for position in args.positions]
    families += [("top-2", "topk", "pos2")] if args.standard else []
    for family, architecture, position in families if not args.exports else []:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            path = Path(scratch) / "model"
            write_model(args.shape, architecture, position, file_dtype, path)
            yield family, architecture == "topk", path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--positions", nargs="+", default=["pos2"], choices=["pos1", "pos2", "pos3"])
    parser.add_argument("--standard", action="store_true", help="also a top-2 MoE, with and without guessed experts")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the computation")
    parser.add_argument("--file-dtype", choices=sorted(DTYPES), help="of the export; default: the same")
    parser.add_argument("--places", type=int, default=2, help="experts that fit into memory, of all layers together")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="where the models are written; default: the temporary directory")
    parser.add_argument("--output", type=Path, help="directory for JSON and table")
    parser.add_argument(
        "--exports", nargs="+", default=[], help="trained models instead of random weights, each in rows of its own"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return
    entries: list[dict[str, Any]] = []
    file_dtype = args.file_dtype or args.dtype
    for family, standard, path in models(args, file_dtype):
        flags = {"path": str(path), "dtype": args.dtype, "places": args.places * (1 + standard)}
        modes = [*MODES, GUESSED] if standard else MODES
        entries += table(measure(flags, modes, args.rounds, args.tokens), family)
    tier = "pinned host memory" if torch.cuda.is_available() else "a file, past the page cache"
    said = " ".join(sys.argv[1:]).replace(f" --scratch {args.scratch}", "")  # where, is no part of the record
    record = {
        "command": f"python -m benchmarks.serving.offload {said}",
        "environment": environment(),
        "model": "trained models" if args.exports else SHAPES[args.shape][1],
        "tier": tier,
        "dtype": args.dtype,
        "file_dtype": file_dtype,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "places": args.places,
        "rows": entries,
    }
    text = markdown(record)
    print(text)
    if args.output:
        name = f"offload_{'trained' if args.exports else args.shape}" + (
            f"_{file_dtype}_file" if file_dtype != args.dtype else ""
        )
        write(args.output, name, record, text, latencies(record))


if __name__ == "__main__":
    main()
