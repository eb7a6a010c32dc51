"""Which expert takes which token: the gate's choices, its random numbers, and what the capacity limit drops.

Shape suffixes: T tokens, E experts, K routed experts per token, C capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from scmoe_ds.moe.order import ByExpert, Order


@dataclass(frozen=True)
class Choices:
    """Which choices are kept, and the rows that they make.

    Attributes:
        expert_KT: int64 global expert id, whether kept or not; any where the token is masked.
        kept_KT: bool; None: all.
        order: the kept ones by expert, and there by location; then the others.
        counts_E: int64 tokens per expert before drops; identity experts last.
        rows_E: int64 tokens per expert after drops; identity experts, which take no rows, are left out.
    """

    expert_KT: Tensor
    kept_KT: Tensor | None
    order: Order
    counts_E: Tensor
    rows_E: Tensor

    @property
    def location_KT(self) -> Tensor:
        """int64 number of the token among its expert's tokens, from 0; any for a choice that is not kept."""
        start_E = self.rows_E.cumsum(0) - self.rows_E
        return self.order.place_KT - start_E.take(self.expert_KT)


def draw(noise: Callable[[int], Tensor], tokens: int, used_T: Tensor | None) -> Tensor:
    """Random numbers, a row for each token. Masked tokens use none up, so that the others get the same without them.

    On a GPU they do: the host would have to wait for the number of the others. These get the first rows all the same.
    """
    if used_T is None:
        return noise(tokens)
    rows = tokens if used_T.is_cuda else int(used_T.sum())
    drawn = F.pad(noise(rows), (0, 0, 0, tokens - rows))
    return drawn.index_select(0, (used_T.cumsum(0) - 1).clamp(min=0))


def uniform(rows: int, experts: int, device: torch.device) -> Tensor:
    """Random numbers to keep tokens by. In fp32 whatever torch's default dtype is: their bits become keys."""
    return torch.rand(rows, experts, device=device, dtype=torch.float32)


@torch.no_grad()
def choose(
    gate: TopKGate, logits_TE: Tensor, probability_TE: Tensor, used_T: Tensor | None, exclude_T: Tensor | None
) -> Tensor:
    """[K, T] the experts that each token chooses, first choices first; any for a masked token."""
    if gate.k > 2:
        return probability_TE.topk(gate.k, dim=1).indices.t().contiguous()
    T, E = logits_TE.shape

    def gumbel_TE() -> Tensor:
        return draw(lambda rows: sharded_moe.gumbel_rsample((rows, E), device=logits_TE.device), T, used_T)

    def without(score_TE: Tensor, expert_T: Tensor) -> Tensor:
        experts_E = torch.arange(E, device=logits_TE.device)
        return score_TE.masked_fill(expert_T.unsqueeze(1) == experts_E, float("-inf"))

    score_TE = probability_TE
    if gate.noisy_gate_policy == "RSample" and gate.training and gate.k == 1:
        score_TE = logits_TE + gumbel_TE()
    if exclude_T is not None:
        # The excluded expert cannot be chosen, but stays in the softmax: G(H) is the same function for both layers.
        score_TE = without(score_TE, exclude_T)
    first_T = score_TE.argmax(1)
    if gate.k == 1:
        return first_T.unsqueeze(0)
    score_TE = logits_TE + gumbel_TE() if gate.top2_2nd_expert_sampling else logits_TE
    return torch.stack([first_T, without(score_TE, first_T).argmax(1)])


@torch.no_grad()
def keep(
    gate: TopKGate, probability_TE: Tensor, chosen_KT: Tensor, used_T: Tensor | None, limit: int | Tensor | None
) -> tuple[Choices, Tensor]:
    """The choices, and [E] the tokens per expert that the balancing loss counts.

    If an expert is chosen more often than `limit`, then k = 1 keeps random tokens (`use_rts`), and k > 2 the most
    probable ones. k = 2 keeps first choices before second ones, each in the order of the tokens. None: no limit.
    """
    (K, T), E = chosen_KT.shape, probability_TE.shape[1]
    priority_KT = None
    if K == 1 and gate.use_rts:
        # Drawn without a limit too, as in DeepSpeed: the next random numbers must not depend on `drop_tokens`.
        random_TE = draw(lambda rows: uniform(rows, E, chosen_KT.device), T, used_T)
        priority_KT = random_TE.gather(1, chosen_KT.t()).t()
    elif K > 2:
        priority_KT = probability_TE.gather(1, chosen_KT.t()).t().contiguous()
    # The keys of choices that are not kept are greater by E, so that they come behind all others.
    key_KT, kept_KT = chosen_KT, None
    if used_T is not None:
        kept_KT = used_T.expand(K, T)
        key_KT = torch.add(chosen_KT, ~kept_KT, alpha=E)
    limit = None if isinstance(limit, int) and limit >= T else limit
    order = ByExpert.of(key_KT, None if limit is None else priority_KT)
    start_X = order.starts(E, parts=2 if K == 2 else 1)
    start_E = start_X[::2] if K == 2 else start_X
    counts_E = start_E[1:] - start_E[:-1]
    # For k = 2 DeepSpeed balances the first choices alone.
    balanced_E = start_X[1::2] - start_X[:-1:2] if K == 2 else counts_E
    if limit is None:
        return Choices(chosen_KT, kept_KT, order, counts_E, counts_E), balanced_E
    rows_E, location_KT = counts_E.clamp(max=limit), order.place_KT - start_E.take(chosen_KT)
    below_KT = location_KT < limit
    if K != 2 and isinstance(limit, int) and not below_KT.is_cuda and _equals_at(limit, order.key_X, start_E):
        kept_KT = _kept_by_topk(chosen_KT, priority_KT, used_T, limit, E)
        order = ByExpert.of(torch.add(chosen_KT, kept_KT, alpha=-E))
        return Choices(chosen_KT, kept_KT, order, counts_E, rows_E), balanced_E
    place_KT = order.place_KT + _shift(start_E, rows_E, limit).take(torch.add(chosen_KT, below_KT, alpha=E))
    if kept_KT is not None:
        place_KT, below_KT = torch.where(kept_KT, place_KT, order.place_KT), below_KT & kept_KT
    return Choices(chosen_KT, below_KT, order.moved(place_KT), counts_E, rows_E), balanced_E


def _shift(start_E: Tensor, rows_E: Tensor, limit: int | Tensor) -> Tensor:
    """[2, E] by how much the dropped choices of each expert move, to behind all kept ones, and then by how much the
    kept ones do, since others have gone from before them.

    Args:
        start_E: [E + 1] where each expert's choices start before the drops.
    """
    end_E = rows_E.cumsum(0)
    before_E = end_E - rows_E
    return torch.stack([end_E[-1] - before_E - limit, before_E - start_E[:-1]])


def _equals_at(limit: int, key_X: Tensor, start_E: Tensor) -> bool:
    """Whether an expert has to choose between two choices of the same priority."""
    if not bool((key_X[1:] == key_X[:-1]).any()):  # nearly always, if there are few tokens
        return False
    dropped = start_E[:-1] + limit  # the first place of each expert's that is
    dropped = dropped[dropped < start_E[1:]]
    return bool((key_X[dropped - 1] == key_X[dropped]).any())


def _kept_by_topk(
    chosen_KT: Tensor, priority_KT: Tensor | None, used_T: Tensor | None, limit: int, experts: int
) -> Tensor:
    """[K, T] what DeepSpeed keeps on a CPU. Of equals, torch's topk keeps the first ones on a GPU, as a stable sort
    does, but any on a CPU."""
    used_T = torch.ones(chosen_KT.shape[1], dtype=torch.bool) if used_T is None else used_T
    priority_KT = torch.ones(chosen_KT.shape, dtype=torch.float32) if priority_KT is None else priority_KT
    priority_TE = priority_KT.new_full((len(used_T), experts), -1.0).scatter_(1, chosen_KT.t(), priority_KT.t())
    best_CE = priority_TE[used_T].topk(limit, dim=0, sorted=False).indices
    kept_TE = torch.zeros_like(priority_TE, dtype=torch.bool)
    kept_TE[used_T] = torch.zeros_like(kept_TE[used_T]).scatter_(0, best_CE, True)
    return kept_TE.gather(1, chosen_KT.t()).t()
