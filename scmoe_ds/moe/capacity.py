"""DeepSpeed's capacity: most tokens that an expert takes, and how many choices it drops.

Shape suffixes: E experts.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

Count = TypeVar("Count", int, Tensor)
"""On the host, or an int64 scalar on a GPU for which the host does not wait."""


def capacity_of(gate: TopKGate, tokens: Count) -> Count:
    """DeepSpeed's capacity for a number of tokens."""
    factor = gate.capacity_factor if gate.training else gate.eval_capacity_factor
    return capacity(tokens, gate.wg.out_features, factor * gate.k, gate.min_capacity)


def capacity(tokens: Count, experts: int, factor: float, least: int) -> Count:
    """Most tokens that an expert takes, of `factor` tokens per token; rounded in fp32, as DeepSpeed does."""
    if isinstance(tokens, Tensor):
        per_expert = (tokens.double() / experts).float()
        return (per_expert * factor).ceil().clamp(min=int(least)).long()
    return max(int(torch.ceil(tokens / experts * torch.tensor(factor))), int(least))


@torch.no_grad()
def dropped_choices(gate: TopKGate, exp_counts: Tensor) -> Tensor:
    """How many choices the capacity limit dropped in a training pass of this rank (int64 scalar on its device).

    Args:
        exp_counts: [E] int64 tokens per expert before drops.
    """
    if not gate.drop_tokens:
        return exp_counts.new_zeros(())
    tokens, factor = exp_counts.sum() // gate.k, gate.capacity_factor * gate.k
    return (exp_counts - capacity(tokens, len(exp_counts), factor, gate.min_capacity)).clamp(min=0).sum()
