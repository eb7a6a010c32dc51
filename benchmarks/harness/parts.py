"""The parts of a pair's step, measured in the step itself: for this package's pairs and for DeepSpeed's.

A pair of this package reports to a recorder. DeepSpeed's layers know no recorder. Hooks put marks of the same recorder
around the blocks' operators, the layer, its experts and its shared expert. All-to-alls are timed where they block. The
rest of the layer is gate, encode, decode and merge.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.models.pairs import PlainPair, StagedPair
from scmoe_ds.overlap.executor import Activations
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.rounds import Reduction, over_ranks
from scmoe_ds.planner.times import SHARED
from scmoe_ds.trace.recorder import SILENT, PairRecorder, Phase, Recorder, Span

CPU = torch.device("cpu")
EXPOSED = "exposed communication"
REST_OF_LAYER = "gate, encode, decode, merge"
KINDS = ("attention", "MLP", "shared expert", REST_OF_LAYER, "experts", EXPOSED)

_PARTS = {"attention": "attention", "mlp": "MLP", "experts": "experts"} | dict.fromkeys(SHARED, "shared expert")
LAYER = "moe layer"  # of DeepSpeed, as a whole


@dataclass(kw_only=True)
class RecordedPair:
    """A pair of this package that a benchmark runs forward.

    Attributes:
        spans: of each step, once it is a list.
    """

    pair: Any
    spans: list[list[Span]] | None = None

    def step(self, hidden: Tensor) -> None:
        """One prefill, whose parts are recorded if `spans` is a list."""
        recorder = None if self.spans is None else Recorder(CPU)
        self.pair.recorder = SILENT if recorder is None else recorder.pair(0)
        with torch.inference_mode():
            self.pair(hidden)
        if recorder is not None and self.spans is not None:
            self.spans.append(recorder.spans())


def kind_of(span: Span) -> str:
    """Which part of a bar a span belongs to."""
    if span.lane == "wait":
        return EXPOSED
    return _PARTS.get(span.kind, REST_OF_LAYER)


def parts_of(spans: list[Span]) -> dict[str, float]:
    """Milliseconds of each of `KINDS` in one step."""
    parts = dict.fromkeys(KINDS, 0.0)
    for span in spans:
        if span.lane != "communication":
            parts[kind_of(span)] += span.duration_ms
    if any(span.name == LAYER for span in spans):  # a layer of DeepSpeed: its span has its parts inside
        parts[REST_OF_LAYER] -= parts["experts"] + parts["shared expert"] + parts[EXPOSED]
    return parts


def layer_ms(spans: list[Span]) -> float:
    """The MoE layer in one step, with its communication and without a shared expert."""
    parts = parts_of(spans)
    return parts[REST_OF_LAYER] + parts["experts"] + parts[EXPOSED]


def sum_ms(steps: Sequence[list[Span]], reduce: Reduction, counts: Callable[[Span], bool]) -> float:
    """The median step's sum of all spans that count. `reduce` picks the rank of each. Collective."""
    sums = []
    for spans in steps:
        found = [span.duration_ms for span in spans if counts(span)]
        sums.append(sum(over_ranks(found, reduce)) if found else 0.0)
    return statistics.median(sums)


def record_steps(run: nn.Module, step: Callable[[], None], count: int) -> list[list[Span]]:
    """The spans of each of `count` steps, under the schedule of the pair. The ranks do not wait for each other."""
    found = []
    for _ in range(count):
        dist.barrier()
        recorder = Recorder(CPU)
        with _told(run, recorder) if isinstance(run, StagedPair) else _marked(run, recorder):
            step()
        found.append(recorder.spans())
    return found


def mean_over_ranks(steps: list[list[Span]]) -> dict[str, float]:
    """The median step's parts, averaged over ranks: milliseconds by kind, the same on every rank. Collective."""
    parts = [parts_of(spans) for spans in steps]
    mine = {kind: statistics.median(each[kind] for each in parts) for kind in KINDS}
    ranks = gather(mine)
    return {kind: statistics.mean(each[kind] for each in ranks) for kind in KINDS}


def hidden_by_waits(steps: list[list[Span]], sent_ms: dict[Phase, float]) -> dict[str, float]:
    """For each pass, the share of its communication that nobody waited for: the slower rank's median step. Collective.

    The hidden share is also the difference to the step without communication. This second look tells forward from
    backward, but it does not see what the transfers cost the computation beside them.

    Args:
        sent_ms: how long the communication of each pass takes with nothing beside it.
    """
    shares: dict[str, float] = {}
    for phase, all_ms in sent_ms.items():
        waited_ms = [
            sum(span.duration_ms for span in spans if span.lane == "wait" and span.phase == phase) for spans in steps
        ]
        (slower_ms,) = over_ranks([statistics.median(waited_ms)])
        shares[phase] = 1 - slower_ms / all_ms
    return shares


@contextmanager
def _told(run: StagedPair, recorder: Recorder) -> Iterator[None]:
    run.recorder = recorder.pair(0)
    try:
        yield
    finally:
        run.recorder = SILENT


@contextmanager
def _marked(run: nn.Module, recorder: Recorder) -> Iterator[None]:
    assert isinstance(run, PlainPair)
    pair = recorder.pair(0)
    blocks: list[Any] = list(run.blocks)
    layer = blocks[-1].moe
    names = {layer: LAYER, layer.deepspeed_moe.experts: "experts"}
    if layer.use_residual:
        names[layer.mlp] = "shared"
    hooks = [hook for module, name in names.items() for hook in mark_module(module, name, pair)]
    for block in blocks:
        block.attend = _mark_operator(block.attend, "attention", pair)
        if block is not blocks[-1]:
            block.feed = _mark_operator(block.feed, "mlp", pair)

    try:
        with timed_all_to_alls(recorder):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for block in blocks:
            for name in ("attend", "feed"):
                block.__dict__.pop(name, None)


@contextmanager
def timed_all_to_alls(recorder: Recorder) -> Iterator[None]:
    """Every all-to-all blocks: it is communication and wait at once. Which pass it belongs to is not known here."""
    original = deepspeed.comm.all_to_all_single

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        ended = time.perf_counter()
        for lane in ("communication", "wait"):
            recorder.add((0, "all-to-all", "all-to-all", lane, "forward", 0), started, ended)
        return result

    with mock.patch.object(deepspeed.comm, "all_to_all_single", timed):
        yield


def _mark_operator(
    operator: Callable[[Activations], Activations], name: str, pair: PairRecorder
) -> Callable[[Activations], Activations]:
    def marked(activations: Activations) -> Activations:
        (entering,) = pair.open(name, activations.hidden)
        (leaving,) = pair.close(name, operator(Activations(entering)).hidden)
        return Activations(leaving)

    return marked


def mark_module(module: nn.Module, name: str, pair: PairRecorder) -> list[Any]:
    def opened(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*pair.open(name, inputs[0]), *inputs[1:])

    def closed(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # the layer's output, its loss, and counts, which have no gradient
            return (*pair.close(name, *output[:2]), *output[2:])
        return pair.close(name, output)[0]

    return [module.register_forward_pre_hook(opened), module.register_forward_hook(closed)]
