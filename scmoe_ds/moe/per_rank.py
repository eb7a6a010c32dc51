"""The layout that sends one copy of a token to each rank that holds any of its experts, for top-k routing with k > 1.

What `ExactLayout` sends per choice, it sends per rank: a token "chooses" ranks, at most min(K, P), as it chooses
experts. With the rows go two numbers for each choice: which of the rows it reads, and its weight. So the rank that gets
them can add up the results of all of its experts for a token, and returns one row.

Rows of D elements each way, for k experts on P ranks: k per token become P * (1 - (1 - 1/P) ** k) if all ranks are
equally likely. For k = 8 these are 2.0 on 2 ranks, 3.6 on 4 and 5.3 on 8.

Shape suffixes: T tokens, D hidden, K top-k, J copies of a token at most, N chunks, P ranks, V senders (1 here), L local
experts, C choices sent, R rows sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.layout import ExactLayout, in_chunks
from scmoe_ds.moe.slices import TokenSlices

_BITS = {4: torch.int32, 8: torch.int64}
"""Row numbers travel beside weights, as numbers of the same width. Nothing computes with them on the way."""


@dataclass(frozen=True)
class PerRankLayout:
    """Rows of tokens, sorted by chunk and rank; choices sorted by chunk, rank and expert.

    Attributes:
        choices: of which nothing is sent but two numbers each.
        copies: of tokens. Its "choices" [J, T] are those of ranks.
        number_KT: int64 row of each choice, counted from the first one for the same chunk and rank; any where dropped.
    """

    choices: ExactLayout
    copies: ExactLayout
    number_KT: Tensor

    @classmethod
    def of(cls, routing: Routing, slices: TokenSlices, num_chunks: int = 1) -> PerRankLayout:
        choices, ranks = ExactLayout.of(routing, slices, num_chunks), slices.group_size
        rank_KT = routing.choices.expert_KT.div(choices.rows_NPVL.shape[-1], rounding_mode="floor")
        slot_KT, rank_JT, used_JT = _slots(rank_KT, routing.choices.kept_KT, ranks)
        copies = ExactLayout.by(in_chunks(rank_JT, num_chunks, ranks), used_JT, (num_chunks, ranks, 1, 1))
        rows_X = copies.rows_NPVL.flatten()
        start_KT = (rows_X.cumsum(0) - rows_X).take(in_chunks(rank_KT, num_chunks, ranks))
        return cls(choices, copies, copies.row_of_choice_KT.gather(0, slot_KT) - start_KT)

    @property
    def rows_NPVX(self) -> Tensor:
        """[N, P, 1, L + 1] int64 choices of each expert, then rows."""
        return torch.cat([self.choices.rows_NPVL, self.copies.rows_NPVL], -1)

    @property
    def checksum(self) -> Tensor:
        """See `ExactLayout`."""
        return self.choices.checksum

    def encode(self, tokens_TD: Tensor) -> Tensor:
        """[T, D] → [R, D]."""
        return self.copies.encode(tokens_TD)

    def decode(self, rows_RD: Tensor, weight_KT: None) -> Tensor:
        """[R, D] → [T, D]: the sum of each token's rows. The ranks that made them have weighted their parts."""
        return self.copies.decode(rows_RD, weight_KT)

    def describe(self, weight_KT: Tensor) -> Tensor:
        """[K, T] → [C, 2] the number of each choice's row, in bits, and its weight. fp32, or fp64 as the weights."""
        return _Describe.apply(weight_KT if weight_KT.dtype == torch.float64 else weight_KT.float(), self)


def row_numbers(choices_C2: Tensor) -> Tensor:
    """[C] int64 of what `PerRankLayout.describe` made."""
    number_C = choices_C2.detach()[:, 0].contiguous()
    return number_C.view(_BITS[number_C.element_size()]).long()


def _slots(rank_KT: Tensor, kept_KT: Tensor | None, ranks: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places for the copies of a token, no more than it can have.

    Returns:
        [K, T] int64 place of each choice's copy in [0, J), any where dropped; [J, T] int64 rank that each place's copy
        goes to; [J, T] bool whether there is one.
    """
    K, T = rank_KT.shape
    if ranks <= K:  # a place for each rank
        rank_J1 = torch.arange(ranks, device=rank_KT.device).unsqueeze(1)
        place_KT = rank_KT if kept_KT is None else torch.where(kept_KT, rank_KT, ranks)
        used_JT = torch.zeros(ranks + 1, T, dtype=torch.bool, device=rank_KT.device)
        return rank_KT, rank_J1.expand(ranks, T), used_JT.scatter_(0, place_KT, True)[:-1]
    # a place for each choice; choices of one rank use the place of the first of them
    same_KKT = rank_KT.unsqueeze(0) == rank_KT.unsqueeze(1)
    if kept_KT is not None:
        same_KKT &= kept_KT.unsqueeze(0)
    slot_KT = same_KKT.to(torch.uint8).argmax(1)
    used_KT = slot_KT == torch.arange(K, device=rank_KT.device).unsqueeze(1)
    return slot_KT, rank_KT, used_KT if kept_KT is None else used_KT & kept_KT


class _Describe(torch.autograd.Function):
    """The gradient of a weight is read where the choice was written. Nothing is added up."""

    @staticmethod
    def forward(ctx: Any, weight_KT: Tensor, layout: PerRankLayout) -> Tensor:
        choices, bits = layout.choices, _BITS[weight_KT.element_size()]
        ctx.save_for_backward(choices.row_of_choice_KT, choices.kept_KT)
        both_2X = torch.stack([layout.number_KT.to(bits).view(weight_KT.dtype), weight_KT]).flatten(1)
        return both_2X.index_select(1, choices.choice_of_row_R).t().contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        row_KT, kept_KT = ctx.saved_tensors
        if grads[0].shape[0] == 0:
            return grads[0].new_zeros(row_KT.shape), None
        grad_KT = grads[0][:, 1].take(row_KT)
        return grad_KT if kept_KT is None else torch.where(kept_KT, grad_KT, 0.0), None
