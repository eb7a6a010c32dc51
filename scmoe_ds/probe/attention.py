"""Attention as the models compute it, by sequence and heads: causal ones of text, windows with a bias of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import Run
from scmoe_ds.probe.sizes import Attended
from scmoe_ds.probe.trials import Computed, Ladder, Trial
from scmoe_ds.trace.recorder import PHASES, Phase

BACKWARD = 2.5
"""Products of the backward pass over those of the forward pass, as `simulate` counts them: five instead of two."""
_INPUTS = ("query", "key", "value")
Shape = tuple[int, int, int, int]
"""Sequences, heads, span, size of a head."""


def attentions(bench: Bench) -> Iterator[Ladder]:
    """Forward and backward."""
    for sizes in bench.sizes.attended:
        for phase in PHASES:
            spans = [span for span in sizes.spans if bench.fits(sizes.sequences * sizes.heads * span * sizes.head)]
            yield [_trial(bench, sizes, span, phase) for span in spans]


def _trial(bench: Bench, sizes: Attended, span: int, phase: Phase) -> Trial[Computed]:
    shape, little = (sizes.sequences, sizes.heads, span, sizes.head), (1, 1, 8, sizes.head)

    def attend(shape: Shape) -> tuple[list[Tensor], Tensor]:
        query, key, value = (bench.take(name, *shape).detach().requires_grad_() for name in _INPUTS)
        bias = None if sizes.causal else bench.take("bias", 1, shape[1], shape[2], shape[2])
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=sizes.causal)
        return [query, key, value], mixed

    def backward(shape: Shape) -> Callable[[], object]:
        inputs, mixed = attend(shape)
        return partial(torch.autograd.grad, mixed, inputs, bench.take("gradient", *shape))

    def prepare() -> Run:
        if phase == "forward":
            return Run(lambda: attend(shape), [bench.take(name, *shape) for name in _INPUTS], lambda: attend(little))
        return Run(backward(shape), [bench.take("gradient", *shape)], backward(little))

    heads = sizes.sequences * sizes.heads
    scores = heads * span * span / (2 if sizes.causal else 1)
    flops = 4 * scores * sizes.head * (1 if phase == "forward" else BACKWARD)
    return bench.trial("attention", [(span, sizes.head, heads)], phase, prepare, flops=flops)
