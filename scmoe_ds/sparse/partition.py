"""Divides experts by their neurons, without a change of what they compute (DualSparse-MoE, arXiv 2508.18376).

An expert f(x) = W2 (act(W1 x) ⊙ W3 x) + b is a sum over its neurons. P parts of them are P experts in one of two ways:

    complete    the gate's rows are repeated, K·P experts are chosen. Each part's score is 1/P of the expert's, where
                scores add up to 1. Its W2 is therefore multiplied by P.
    partial     the gate stays. Its choice of expert e becomes e·P … e·P + P - 1, each with the score of e. W2 stays.

The output bias is added once: it is divided by P, and multiplied like W2.

Shape suffixes: D hidden, E experts, F neurons of an expert, H neurons of a part.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.tensor import Split, shard

Method = Literal["complete", "partial"]
METHODS: tuple[Method, ...] = ("complete", "partial")


def check_parts(parts: int, width: int | None = None) -> None:
    """Raises a CheckpointError for fewer than two parts, or parts that do not divide an expert's neurons.

    Args:
        width: neurons of an expert; None: they are not known yet.
    """
    if parts < 2:
        raise CheckpointError(f"--parts {parts}: must be at least 2, or nothing is divided")
    if width is not None and width % parts:
        raise CheckpointError(f"--parts {parts}: must divide the {width} neurons of an expert; use another number")


def input_part(whole: Tensor, part: int, parts: int, projections: int = 1) -> Tensor:
    """The neurons of a part, from weights or biases of what an expert reads with.

    Args:
        whole: [n·F, D] or [n·F], n = `projections` below each other; gate and up projection of a SwiGLU are two.

    Returns:
        [n·H, D] or [n·H].
    """
    width = whole.shape[0] // projections
    return shard(whole, Split(0, (width,) * projections), part, parts)


def output_part(whole_DF: Tensor, part: int, parts: int, factor: float = 1.0) -> Tensor:
    """[D, F] → [D, H] output weights of a part.

    Args:
        factor: P for a complete partition whose scores become 1/P; 1 otherwise.
    """
    part_DH = shard(whole_DF, Split(1, (whole_DF.shape[1],)), part, parts)
    return part_DH if factor == 1 else part_DH * factor


def output_bias(whole_D: Tensor, parts: int, factor: float = 1.0) -> Tensor:
    """[D] output bias of each part; `factor` as for the weights."""
    return whole_D if factor == parts else whole_D * (factor / parts)


def repeated(gate_E: Tensor, parts: int) -> Tensor:
    """[E, …] → [E·P, …] rows of a gate, or corrections of its scores, for a complete partition."""
    return gate_E.repeat_interleave(parts, 0)
