"""Top-1 routing in three kernels and a sort, where eager PyTorch launches some thirty kernels.

Kernels of a few microseconds each cost a GPU's host more than the GPU. What the kernels compute is what
scmoe_ds.moe.choices and scmoe_ds.moe.gate compute, for k = 1 without masks and noise.

Shape suffixes: T tokens, E experts, B blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scmoe_ds.moe.choices import Choices, uniform
from scmoe_ds.moe.order import Order


@dataclass(frozen=True)
class Top1Kernels:
    """The four kernels, each of which writes new tensors.

    Attributes:
        choose: (logits [T, E], random numbers [T, E] or None) → expert [T] int64, its probability [T], key [T] int64,
            sums of the probabilities [B, E]. In the order of their keys, tokens lie by expert, and there by descending
            random number.
        count: (sorted keys [T], sums [B, E], limit) → counts [E] int64 before drops, rows [E] int64 after them, start
            of each expert's tokens among the sorted ones [E] int64, start of its rows [E + 1] int64, loss (scalar).
        place: (sorted keys [T], token at each place [T], starts [E], starts of rows [E + 1], probability [T], limit) →
            token of each row [T], row of each token [T], which are kept [T] bool, weight [T]. Rows are the tokens that
            are kept by expert, and behind them the others.
        gradient: (logits, expert [T], kept [T], counts [E], gradient of the weight [T], gradient of the loss) →
            gradient of the logits [T, E].
    """

    choose: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]
    count: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    place: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def choose_top1(
    kernels: Top1Kernels, logits_TE: Tensor, use_rts: bool, limit: int | None
) -> tuple[Choices, Tensor, Tensor]:
    """The choices, [1, T] their weights, and the balancing loss.

    Args:
        logits_TE: fp32; one token or more.
        use_rts: a limit keeps random tokens, otherwise the first ones.
        limit: most tokens of an expert; None: no limit.
    """
    T, E = logits_TE.shape
    # Drawn without a limit too, as in DeepSpeed: the next random numbers must not depend on `drop_tokens`.
    random_TE = uniform(T, E, logits_TE.device) if use_rts else None
    limit = None if limit is None or limit >= T else limit
    weight_T, l_aux, expert_T, kept_T, token_X, row_T, counts_E, rows_E = _Top1.apply(
        logits_TE, None if limit is None else random_TE, T if limit is None else limit, kernels
    )
    kept_KT = None if limit is None else kept_T.unsqueeze(0)
    order = Order(token_X, row_T.unsqueeze(0))
    return Choices(expert_T.unsqueeze(0), kept_KT, order, counts_E, rows_E), weight_T.unsqueeze(0), l_aux


class _Top1(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, random_TE: Tensor | None, limit: int, kernels: Top1Kernels
    ) -> tuple[Tensor, ...]:
        logits_TE = logits_TE.contiguous()
        expert_T, probability_T, key_T, sums_BE = kernels.choose(logits_TE, random_TE)
        key_X, token_X = torch.sort(key_T, stable=True)
        counts_E, rows_E, start_E, row_start_E, l_aux = kernels.count(key_X, sums_BE, limit)
        token_X, row_T, kept_T, weight_T = kernels.place(key_X, token_X, start_E, row_start_E, probability_T, limit)
        ctx.save_for_backward(logits_TE, expert_T, kept_T, counts_E)
        ctx.kernels = kernels
        choices = (expert_T, kept_T, token_X, row_T, counts_E, rows_E)
        ctx.mark_non_differentiable(*choices)
        return weight_T, l_aux, *choices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernels.gradient(*ctx.saved_tensors, grads[0].contiguous(), grads[1]), None, None, None
