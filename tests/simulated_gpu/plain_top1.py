"""What the kernels of scmoe_ds.moe.top1 compute, in plain PyTorch: each stands for its kernel on the simulated device."""

from __future__ import annotations

import torch
from torch import Tensor

from scmoe_ds.moe.top1 import Top1Kernels
from tests.simulated_gpu.operators import fused

SPAN = 2**32


def choose(logits_TE: Tensor, random_TE: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    share_TE = logits_TE.softmax(1)
    probability_T, expert_T = share_TE.max(1)
    key_T = expert_T * SPAN
    if random_TE is not None:
        key_T = key_T - random_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1).view(torch.int32)
    return expert_T, probability_T, key_T, share_TE.sum(0, keepdim=True)


def count(key_X: Tensor, sums_BE: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = len(key_X), sums_BE.shape[1]
    start_E = torch.searchsorted(key_X, torch.arange(E + 1) * SPAN - SPAN // 2)
    counts_E = start_E.diff()
    rows_E = counts_E.clamp(max=limit)
    row_start_E = torch.cat([torch.zeros(1, dtype=torch.int64), rows_E.cumsum(0)])
    l_aux = ((sums_BE.sum(0) / T) * (counts_E / T)).sum() * E
    return counts_E, rows_E, start_E[:-1].clone(), row_start_E, l_aux


def place(
    key_X: Tensor, token_X: Tensor, start_E: Tensor, row_start_E: Tensor, probability_T: Tensor, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    expert_X = (key_X + SPAN // 2) // SPAN
    location_X = torch.arange(len(key_X)) - start_E[expert_X]
    kept_X, before_X = location_X < limit, row_start_E[expert_X]
    row_X = torch.where(
        kept_X, before_X + location_X, row_start_E[-1] + start_E[expert_X] - before_X + location_X - limit
    )
    row_T, kept_T = torch.empty_like(row_X), torch.empty_like(kept_X)
    row_T[token_X], kept_T[token_X] = row_X, kept_X
    return row_T.argsort(), row_T, kept_T, probability_T * kept_T


def gradient(
    logits_TE: Tensor, expert_T: Tensor, kept_T: Tensor, counts_E: Tensor, grad_weight_T: Tensor, grad_loss: Tensor
) -> Tensor:
    """By PyTorch, from the operators that the kernels replace."""
    T, E = logits_TE.shape
    with torch.enable_grad():
        logits_TE = logits_TE.detach().requires_grad_()
        share_TE = logits_TE.softmax(1)
        weight_T = share_TE.gather(1, expert_T.unsqueeze(1)).squeeze(1) * kept_T
        l_aux = (share_TE.mean(0) * (counts_E / T)).sum() * E
        (grad_TE,) = torch.autograd.grad([weight_T, l_aux], [logits_TE], [grad_weight_T, grad_loss])
    return grad_TE


PLAIN_TOP1 = Top1Kernels(*(fused(f"top-1 {each.__name__}", each) for each in (choose, count, place, gradient)))
