"""The bytes of a rank at the moment of a step when most are alive, by what they are for.

`scmoe check` counts the same by running a step on tensors without values, which takes a minute. This is arithmetic, for
a search over thousands of layouts; benchmarks/results/plan_memory.md compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.parameters import count
from scmoe_ds.simulate.step_work import for_one_rank, step_work
from scmoe_ds.simulate.work import PairWork, Work

BESIDE = 2e9
"""A guess: CUDA's context, NCCL's buffers, and what the caching allocator cannot use. As in `scmoe check`."""
_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights, gradients: of this rank.
        optimizer: its states, and the fp32 weights that it updates.
        activations: from the forward pass for the backward pass.
        temporaries: what the loss, the backward pass or the optimizer's step needs for a moment.
        buffers: of DeepSpeed's reductions.
        beside: all that is no tensor, a guess.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporaries: float
    buffers: float
    beside: float = BESIDE

    @property
    def tensors(self) -> float:
        """All but `beside`."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporaries + self.buffers

    @property
    def total(self) -> float:
        return self.tensors + self.beside


def memory_of(model: Model, method: Method, layout: Layout) -> Memory:
    """The most that a rank needs in a step, with even routing.

    Raises:
        ModelError: a method or layout that the model cannot run with.
    """
    return max(_moments(model, method, layout), key=lambda memory: memory.tensors)


def _moments(model: Model, method: Method, layout: Layout) -> Iterator[Memory]:
    """When the backward pass begins, when a pair that is computed again is whole, and in the optimizer's step."""
    width = 4 if layout.precision == "fp32" else 2
    kept, largest, loss = _activations(model, method, for_one_rank(layout))
    if not layout.training:
        held = count(model, method, layout)
        yield Memory((held.dense + held.experts) * width, 0.0, 0.0, largest, loss / 2, 0.0)
        return
    held = count(model, method, layout)
    whole = held.dense + held.experts
    shard = held.dense / layout.data_parallel + held.experts / layout.expert_data_parallel
    stage = layout.zero_stage
    weights = (shard if stage == 3 else whole) * width
    gradients = (shard if stage >= 2 else whole) * width
    updated = shard if stage else whole
    optimizer = updated * _FP32 * (layout.states + (1 if stage or width < _FP32 else 0))
    bucket = layout.reduce_bucket * width if stage else 0.0
    # Of the first micro-batch there are no gradients yet.
    before = gradients if layout.accumulation > 1 else 0.0
    yield Memory(weights, before, optimizer, kept, loss, bucket)
    if layout.recompute in ("full", True):
        yield Memory(weights, gradients, optimizer, kept + largest, 0.0, bucket)
    yield Memory(weights, gradients, optimizer, 0.0, updated * _FP32 * (1 if width < _FP32 else 0), bucket)


@functools.lru_cache(maxsize=4096)
def _activations(model: Model, method: Method, layout: Layout) -> tuple[float, float, float]:
    """Bytes that a forward pass keeps, that its largest pair would keep, and that the loss needs for a moment."""
    work = step_work(model, method, layout)
    kept = work.first.kept + work.last.kept + sum(pair.count * _kept(pair) for pair in work.pairs)
    whole = work
    if layout.recompute in ("full", True):
        whole = step_work(model, method, replace(layout, recompute=False))
    largest = max(_kept(pair) for pair in whole.pairs)
    logits = layout.micro_batch * model.stages[0].tokens * model.vocabulary / layout.tensor_parallel
    return kept, largest, 0.0 if model.images else 2 * logits * _FP32


def _kept(pair: PairWork) -> float:
    parts: tuple[Work, ...] = (*pair.before, pair.gate, pair.encode, *pair.backbone, pair.experts, pair.decode)
    return sum(work.kept for work in parts)
