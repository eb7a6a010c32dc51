"""Load-aware thresholds of DualSparse-MoE: under expert parallelism the ranks that have more to do drop more.

    r_d = rows of rank d / mean rows of a rank        T_d = T_max * min(1, r_d)

All ranks wait for the fullest one, so what is dropped on the others saves no time. The sources leave open whether it is
T_max that is scaled; here it is, both thresholds alike. So the rate over all ranks is that of T_max or less.

The thresholds come in levels, T_max * g / (levels - 1). A rank tells each other one how many rows it has for it at each
level, and how many rows it has for every rank. From the second all ranks know all loads and take the same levels; from
the first each then knows what it will get. So the decision takes no other exchange than that of the row counts.

Shape suffixes: T tokens, K choices of a token, E experts, L local experts, P ranks, G levels, X numbers of a notice, Y
counts of a level: rows of each place, and of tokens where a token has one row per rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scmoe_ds.moe.dropping import DropCounts, Places, Thresholds, criterion, drop
from scmoe_ds.moe.early import Decision
from scmoe_ds.moe.exchange import one_row_per_rank
from scmoe_ds.moe.experts import to_device
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices

LEVELS = 8
"""Of thresholds: a step is a seventh of T_max. A notice has as many counts as there are levels, a kilobyte for 8 local
experts, and a finer step would change few choices."""


def levels_of(loads_P: Sequence[int], levels: int) -> list[int]:
    """The level of each rank: that nearest to min(1, load / mean load) of the highest. Whole numbers on all ranks.

    >>> levels_of([100, 50, 0, 250], 8)
    [7, 4, 0, 7]
    """
    total, ranks, top = sum(loads_P), len(loads_P), levels - 1
    return [min(top, (2 * load * ranks * top + total) // (2 * total)) if total else 0 for load in loads_P]


class LoadAwareRule:
    """An early rule (moe/early.py).

    Tensor-parallel size 1 and one chunk; `require_load_aware` of scmoe_ds.inference.dropping sees to that.

    Args:
        highest: T_max of this layer.
        places: of a rank.
        device: of the layer.

    Attributes:
        chosen: the level of each rank in the last routing.
    """

    def __init__(self, highest: Thresholds, places: Places, device: torch.device, levels: int = LEVELS) -> None:
        self.places, self.counts, self.levels = places, DropCounts(device), levels
        each = [highest.scaled(level / (levels - 1)) for level in range(levels)]
        self._skip_G = torch.tensor([thresholds.skip for thresholds in each], dtype=torch.float32, device=device)
        self._halve_G = torch.tensor([thresholds.halve for thresholds in each], dtype=torch.float32, device=device)
        self.chosen: list[int] = []

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        """[P, X] int64: for each level the rows for each place of the rank, and then this rank's rows for every one."""
        ranks, choices = slices.group_size, routing.choices
        # A choice is computed, or computed whole, at the levels below a number; at none if it is not kept.
        criterion_KT, kept_KT = criterion(routing).contiguous(), choices.kept_KT
        computed_KT, whole_KT = (
            torch.bucketize(criterion_KT, bounds_G, right=True) * (1 if kept_KT is None else kept_KT)
            for bounds_G in (self._skip_G, self._halve_G)
        )
        shape = ranks, self.places.local_experts, self.levels
        computed_PLG = self._at_levels(choices.expert_KT, computed_KT, len(choices.rows_E)).view(shape)
        counts = [computed_PLG]
        if self.places.halves == 2:
            whole_PLG = self._at_levels(choices.expert_KT, whole_KT, len(choices.rows_E)).view(shape)
            counts = [whole_PLG, computed_PLG - whole_PLG]
        rank_KT = self._rank_of(choices.expert_KT)
        if one_row_per_rank(len(rank_KT), slices):
            counts.append(self._tokens_at_levels(rank_KT, computed_KT, ranks).unsqueeze(1))
        loads_P = choices.rows_E.view(ranks, -1).sum(1)
        return torch.cat([torch.cat(counts, dim=1).transpose(1, 2).flatten(1), loads_P.expand(ranks, ranks)], dim=1)

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        """The choices that each rank's level leaves. Known without another exchange: what this rank sends and gets."""
        ranks, rank = slices.group_size, slices.rank
        loads_P = told_PX[:, -ranks:].sum(0).tolist()
        self.chosen = levels_of(loads_P, self.levels)
        own_PGY, told_PGY = (each[:, :-ranks].unflatten(1, (self.levels, -1)) for each in (own_PX, told_PX))
        sent_PY = own_PGY[torch.arange(ranks), torch.tensor(self.chosen)]
        level_P = to_device(torch.tensor(self.chosen), routing.choices.expert_KT.device)
        rank_KT = self._rank_of(routing.choices.expert_KT)
        skip_KT, halve_KT = (bounds_G.take(level_P).take(rank_KT) for bounds_G in (self._skip_G, self._halve_G))
        dropped = drop(routing, skip_KT, halve_KT, self.places, ranks)
        self.counts.add(routing, dropped, self.places)
        return Decision(dropped, (sent_PY, told_PGY[:, self.chosen[rank]]))

    def _rank_of(self, expert_KT: Tensor) -> Tensor:
        return expert_KT.div(self.places.local_experts, rounding_mode="floor")

    def _at_levels(self, expert_KT: Tensor, below_KT: Tensor, experts: int) -> Tensor:
        """[E, G] int64 of choices, each of which counts at the levels below a number."""
        number_EG = expert_KT.new_zeros(experts * (self.levels + 1))
        key_X = (expert_KT * (self.levels + 1) + below_KT).flatten()
        number_EG.scatter_add_(0, key_X, torch.ones_like(key_X))
        return _above(number_EG.view(experts, -1))

    def _tokens_at_levels(self, rank_KT: Tensor, below_KT: Tensor, ranks: int) -> Tensor:
        """[P, G] int64 tokens with any choice for each rank."""
        below_PT = below_KT.new_zeros(ranks, below_KT.shape[1]).scatter_reduce_(0, rank_KT, below_KT, "amax")
        rank_PT = torch.arange(ranks, device=below_PT.device).unsqueeze(1).expand_as(below_PT)
        return self._at_levels(rank_PT, below_PT, ranks)


def _above(number_EG: Tensor) -> Tensor:
    """[E, G + 1] → [E, G] how many have a greater number than each of 0 … G - 1."""
    return number_EG.flip(1).cumsum(1).flip(1)[:, 1:]
