"""Attention as it was before FlashAttention: scores go through the memory, once per kernel.

The paper does not say which kernels its GPTs ran. With fused attention, the rows without a shortcut are explained less
well, whatever the fitted numbers are.
"""

from __future__ import annotations

from dataclasses import replace

from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.work import Kernel, Part, StepWork, Work

_FORWARD, _BACKWARD = 12, 16
"""Times that all scores are read or written, 2 bytes each. Forward: product 1, scale and mask 2, softmax in fp32 and
back 6, dropout 2, product with the values 1. Backward: of the values 2, dropout 2, softmax 8, scale and mask 2, product
2."""
_LAUNCHES = 5


def unfused(work: StepWork, model: Model) -> StepWork:
    """The same step with every causal attention unfused; the masked half of the scores is computed, too."""
    (stage,) = model.stages
    pairs = tuple(
        replace(
            pair,
            before=tuple(_work(each, stage.head_dim) for each in pair.before),
            backbone=tuple(_work(each, stage.head_dim) for each in pair.backbone),
        )
        for pair in work.pairs
    )
    return replace(work, pairs=pairs, last=_work(work.last, stage.head_dim))


def _work(work: Work, head_dim: int) -> Work:
    return replace(
        work,
        forward=_parts(work.forward, head_dim, 1.0, _FORWARD),
        backward=_parts(work.backward, head_dim, 2.5, _BACKWARD),
    )


def _parts(parts: tuple[Part, ...], head_dim: int, products: float, passes: int) -> tuple[Part, ...]:
    """
    Args:
        products: FLOPs of these kernels over those of a forward pass; FlashAttention computes the scores again.
    """
    found: list[Part] = []
    for part in parts:
        if not isinstance(part, Kernel) or part.kind != "attention":
            found.append(part)
            continue
        scores = part.flops / products / (2 * head_dim)
        flops = 4 * scores * head_dim * (1 if products == 1 else 2)
        found += [replace(part, flops=flops), Kernel("pointwise", bytes=2 * scores * passes, launches=_LAUNCHES)]
    return tuple(found)
