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
_LIVE = 1e9
"""Parameters that ZeRO-3 leaves whole after their use: DeepSpeed's stage3_max_live_parameters."""


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
    """The loss; the backward pass when it begins, and when it ends; the optimizer's step."""
    width = 4 if layout.precision == "fp32" else 2
    kept = _activations(model, method, for_one_rank(layout))
    everything = kept.all * min(method.in_flight, layout.accumulation)
    held = count(model, method, layout)
    whole = held.dense + held.experts
    if not layout.training:
        yield Memory(whole * width, 0.0, 0.0, kept.pair, kept.loss / 2, 0.0)
        return
    shard = held.dense / layout.data_parallel + held.experts / layout.expert_data_parallel
    stage = layout.zero_stage
    weights = (min(whole, shard + _LIVE) if stage == 3 else whole) * width
    gradients = (shard if stage >= 2 else whole) * width
    updated = shard if stage else whole
    optimizer = updated * _FP32 * (layout.states + (1 if stage or width < _FP32 else 0))
    bucket = layout.reduce_bucket * width * (2 if layout.reduces_beside else 1) if stage else 0.0
    # Of the first micro-batch there are no gradients yet. ZeRO-1 keeps the bucket from one to the next.
    before = gradients if layout.accumulation > 1 else 0.0
    # ZeRO-2 leaves gradients where they are until they fill the bucket; the shard's come out of them.
    waiting = min(whole, layout.reduce_bucket) * width if stage == 2 else 0.0
    yield Memory(weights, before, optimizer, everything, kept.loss, bucket if stage == 1 and before else 0.0)
    yield Memory(weights, max(before, waiting), optimizer, everything - kept.head + kept.again, 0.0, bucket)
    yield Memory(weights, max(gradients, waiting), optimizer, max(kept.pair, kept.again), 0.0, bucket)
    yield Memory(weights, gradients, optimizer, 0.0, updated * _FP32 if width < _FP32 else 0.0, bucket)


@dataclass(frozen=True)
class _Kept:
    """Bytes from a forward pass for the backward pass.

    Attributes:
        all: of the whole model.
        head: of this by final norm, head and loss.
        pair: by the largest pair.
        again: by the largest pair when it is computed again; 0: none is.
        loss: what the loss needs for a moment: the gradients of the logits in fp32, before and behind the softmax. Over
            a vocabulary that ranks share, megatron-core computes them in place, beside the logits.
    """

    all: float
    head: float
    pair: float
    again: float
    loss: float


@functools.lru_cache(maxsize=4096)
def _activations(model: Model, method: Method, layout: Layout) -> _Kept:
    width = 4 if layout.precision == "fp32" else 2
    work = step_work(model, method, layout)
    whole = work
    if layout.recompute in ("full", True):
        whole = step_work(model, method, replace(layout, recompute=False))
    logits = layout.micro_batch * model.stages[0].tokens * model.vocabulary / layout.tensor_parallel
    return _Kept(
        all=work.first.kept + work.last.kept + sum(pair.count * _kept(pair) for pair in work.pairs),
        head=work.last.kept,
        pair=max(_kept(pair) for pair in work.pairs),
        again=max(_kept(pair) for pair in whole.pairs) if whole is not work else 0.0,
        loss=0.0 if model.images else logits * (2 * _FP32 if layout.tensor_parallel == 1 else width),
    )


def _kept(pair: PairWork) -> float:
    parts: tuple[Work, ...] = (*pair.before, pair.gate, pair.encode, *pair.backbone, pair.experts, pair.decode)
    return sum(work.kept for work in parts)
