"""Which routed expert of each MoE layer a text keeps busiest: it may become the shared expert of an adapted model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.models.gpt import GPT


@torch.no_grad()
def busiest_experts(model: GPT, batches: Iterable[Tensor]) -> list[int]:
    """For each MoE layer, the expert that most tokens choose while no layer is converted; the same on every rank.

    Collective: all ranks run the same number of batches, each its own.

    Args:
        batches: tokens [B, S] on the model's device; at least one.
    """
    was_training, totals = model.training, list[Tensor]()
    model.eval()
    with model.conversion.as_source():
        for tokens in batches:
            counts = model(tokens, labels=tokens).exp_counts  # with labels no rank gathers the vocabulary
            totals = [total + own for total, own in zip(totals, counts, strict=True)] if totals else list(counts)
    model.train(was_training)
    if dist.is_initialized():
        for total in totals:  # ranks that share a layer count the same tokens, and so all of them as often
            dist.all_reduce(total)
    return [int(total.argmax()) for total in totals]
