"""Processes that generate with experts in the memory or outside of it, turn by turn as they are asked.

All offloaded modes share a process: the rate at which direct reads fill a buffer depends on which memory it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from scmoe_ds.trace.recorder import SILENT, Recorder

SHAPES = {
    "medium": (GPTSettings(24, 1024, 16, 50304, 2048), "GPT2-MoE-Medium with 8 experts, 24 layers"),
    "xl": (GPTSettings(12, 2048, 32, 50304, 2048), "GPT3-MoE-XL cut to 12 of its 24 layers"),
    "tiny": (GPTSettings(4, 64, 4, 512, 128), "a tiny model, to try the program"),
}
MODES = ("resident", "offload", "offload-async")
AGAIN = "resident again"
GUESSED = "offload-async, guessed"
RESIDENT = ("resident", AGAIN)
PROMPT = list(range(1, 9))


def write_model(shape: str, architecture: str, position: str, dtype: str, out: Path) -> None:
    """An export of random weights on the disk itself, one parameter in memory at a time."""
    settings = SHAPES[shape][0]
    section = {"architecture": architecture, "position": position, "num_experts": 8}
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    with torch.device("meta"):
        model = GPT(settings, config)
    # Numbers that repeat after 16 million: to draw all of them takes longer than to measure.
    normal = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1)).repeat(2)

    def reader(name: str, like: Tensor) -> Callable[[], Tensor]:
        if like.ndim == 1:
            return lambda: torch.full(like.shape, float("norm" in name and name.endswith("weight")))
        # Gates of this scale choose evenly and not by a hair.
        scale = 0.5 if name.endswith("gate.wg.weight") else 0.02
        first, repeats = 7919 * sum(map(ord, name)) % (1 << 24), -(-like.numel() // (1 << 24))
        start = normal[first:]
        return lambda: (start.repeat(repeats) if repeats > 1 else start)[: like.numel()].view(like.shape) * scale

    weights = [(name, reader(name, parameter)) for name, parameter in sorted(model.named_parameters())]
    write_weights(out, weights, describe_model(settings, config), DTYPES[dtype], 10**9)
    for file in out.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())


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
        self._entered, self._passes, self._before = 0.0, [0.0], Counter[str]()
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
        if len(self._passes) == 1:  # the prompt has been read
            self._before = self._counts()

    def _counts(self) -> Counter[str]:
        return Counter(vars(self.store.counts) if self.store else {})

    def turn(self, mode: str, tokens: int, seed: int) -> dict[str, Any]:
        """Generates, and tells the mean milliseconds of a pair in a decode step, and what the store did in these.

        "resident again" is recorded, and tells the window, too.
        """
        hooks = guess_experts(self.model) if mode == GUESSED else []
        runs, recorder = self.model.scheduled_pairs(), Recorder(self.device)
        for index, run in enumerate(runs):
            run.recorder = recorder.pair(index) if mode == AGAIN else SILENT
            if self.store:
                run.layer.deepspeed_moe.experts.early = mode != "offload"
        self._passes = []
        request = Request(tokens + 1, Sampling(1.0, seed=seed))
        (completion,) = self.generator.generate([PROMPT], request)
        for hook in hooks:
            hook.remove()
        milliseconds = 1e3 * statistics.fmean(self._passes[1:]) / self.pairs  # the first is the prefill
        counts = self._counts()
        counts.subtract(self._before)
        window = self._window_ms(recorder) if mode == AGAIN else None
        return {"pair_ms": milliseconds, "tokens": completion.tokens, "counts": dict(counts), "window_ms": window}

    def _window_ms(self, recorder: Recorder) -> float:
        """What the backbone of a pair computes between tap and join in a decode step: the mean of all."""
        runs = self.model.scheduled_pairs()
        names = {index: {operator.label for operator in backbone(run)} for index, run in enumerate(runs)}
        windows, seen = Counter[tuple[int, int]](), Counter[tuple[int, str]]()
        for span in recorder.spans():
            if span.name in names[span.layer]:
                windows[span.layer, seen[span.layer, span.name]] += span.duration_ms
                seen[span.layer, span.name] += 1
        return statistics.fmean([value for (_, number), value in windows.items() if number] or [0.0])

    def peak_bytes(self) -> int:
        """Memory of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def work(flags: dict[str, Any]) -> None:
    """Serves turns that are asked for on the standard input, one JSON object a line."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints
        worker = Worker(flags)
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            answer = worker.peak_bytes() if order is None else worker.turn(**order)
            print(json.dumps(answer), file=answers, flush=True)


class Process:
    """A worker, from outside."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.offload_worker", json.dumps(flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        """Waits until it has loaded its model."""
        self._answer()

    def ask(self, order: dict[str, Any] | None) -> Any:
        """The answer to one order; None: the peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

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

    def ready(self) -> None:
        """As `Process.ready`."""

    def ask(self, order: dict[str, Any] | None) -> Any:
        """As `Process.ask`."""
        return self._worker.peak_bytes() if order is None else self._worker.turn(**order)

    def close(self) -> None:
        """As `Process.close`."""


@contextlib.contextmanager
def started(flags: dict[str, Any], in_process: bool) -> Iterator[dict[bool, Process | SameProcess]]:
    """The resident and the offloaded process, which load at the same time."""
    running: dict[bool, Process | SameProcess] = {}
    try:
        for offloaded in (False, True):
            kind = SameProcess if in_process else Process
            running[offloaded] = kind({**flags, "offloaded": offloaded})
        for process in running.values():
            process.ready()
        yield running
    finally:
        for process in running.values():
            process.close()


def measure(
    flags: dict[str, Any], modes: Sequence[str], rounds: int, tokens: int, in_process: bool = False
) -> dict[str, Any]:
    """What every mode answers in every round, all of its texts, and both processes' memory.

    Args:
        in_process: load both models into this process, to try the program.
    """
    answers: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    texts: dict[str, list[Any]] = {mode: [] for mode in modes}
    with started(flags, in_process) as running:
        for number in range(-1, rounds):
            shift = number % len(modes)
            for mode in [*modes[shift:], *modes[:shift]]:
                answer = running[mode not in RESIDENT].ask({"mode": mode, "tokens": tokens, "seed": number})
                texts[mode].append(answer.pop("tokens"))
                if number >= 0:
                    answers[mode].append(answer)
        peaks = {mode: running[mode not in RESIDENT].ask(None) for mode in modes}
    return {"answers": answers, "texts": texts, "peaks": peaks}


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
