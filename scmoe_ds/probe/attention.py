"""Attention as the models compute it, by sequence and heads: causal ones of text, windows with a bias of images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import Run
from scmoe_ds.probe.sizes import Attended
from scmoe_ds.probe.trials import Computed, Ladder, Trial
from scmoe_ds.trace.recorder import PHASES, Phase


def attentions(bench: Bench) -> Iterator[Ladder]:
    """Forward and backward."""
    for sizes in bench.sizes.attended:
        for phase in PHASES:
            spans = [span for span in sizes.spans if bench.fits(sizes.sequences * sizes.heads * span * sizes.head)]
            yield [_trial(bench, sizes, span, phase) for span in spans]


def _trial(bench: Bench, sizes: Attended, span: int, phase: Phase) -> Trial[Computed]:
    shape = (sizes.sequences, sizes.heads, span, sizes.head)

    def attend() -> tuple[list[Tensor], Tensor]:
        query, key, value = (bench.take(name, *shape).detach().requires_grad_() for name in ("query", "key", "value"))
        bias = None if sizes.causal else bench.take("bias", 1, sizes.heads, span, span)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=sizes.causal)
        return [query, key, value], mixed

    def prepare() -> Run:
        if phase == "forward":
            return Run(attend, [bench.take(name, *shape) for name in ("query", "key", "value")])
        inputs, mixed = attend()
        gradient = bench.take("gradient", *shape)
        return Run(partial(torch.autograd.grad, mixed, inputs, gradient), [gradient])

    heads = sizes.sequences * sizes.heads
    scores = heads * span * span / (2 if sizes.causal else 1)
    flops = 4 * scores * sizes.head * (1 if phase == "forward" else 2)
    return bench.trial("attention", [(span, sizes.head, heads)], phase, prepare, flops=flops)
