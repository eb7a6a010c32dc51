"""Load-aware thresholds of DualSparse-MoE (arXiv 2508.18376): ranks that have more to do drop more.

    r_d = rows of rank d / mean rows of a rank        T_d = T_max * min(1, r_d)

All ranks wait for the fullest one: what is dropped on the others saves no time. The paper leaves open whether T_max is
scaled; here it is. T_max is chosen in each step, such that all ranks together drop the wanted share of its choices.

Thresholds come in levels, from those that leave nothing out to the highest. A rank's notice to rank d has two parts:

    for d alone       how many rows it has for each of d's places, at each level
    the same to all   how many rows it has for each rank, and how much each level would leave out of these

The sums of the second part are the same on all ranks, so that all choose the same level for every rank. The first part
then says how many rows each rank sends and gets at these levels. So the exchange of row counts is the only one.

Shape suffixes: T tokens, K choices of a token, E experts, L local experts, P ranks, G levels, X numbers of a notice, Y
row counts of a level: for each place, and for tokens where a token has one row per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scmoe_ds.moe.decisions.dropping import DropCounts, Places, Thresholds, criterion, drop
from scmoe_ds.moe.early import Decision
from scmoe_ds.moe.exchange import one_row_per_rank
from scmoe_ds.moe.experts import to_device
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices

_MILLIONTHS = 10**6


class Levels:
    """The thresholds from which a layer's are chosen.

    All ranks must choose alike: only whole numbers are added up, whose sum does not depend on their order, and only
    single products are rounded.

    Args:
        thresholds: rising from those that leave nothing out.
        wanted: share of the computation that all ranks together leave out.

    Raises:
        ValueError: thresholds that fall.
    """

    def __init__(self, thresholds: Sequence[Thresholds], wanted: float) -> None:
        self.thresholds, self._wanted = list(thresholds), round(_MILLIONTHS * wanted)
        if any(a.skip > b.skip or a.halve > b.halve for a, b in pairwise(thresholds)):
            raise ValueError(f"thresholds = {self.thresholds}: must not fall from level to level")
        # Of two thresholds the upper one stands for T: the lower one is 0 at several levels.
        self._upper_G = torch.tensor([each.halve for each in thresholds], dtype=torch.float64)
        self._bounds = (self._upper_G[1:] + self._upper_G[:-1]) / 2

    def __len__(self) -> int:
        return len(self.thresholds)

    def of_ranks(self, loads_P: Tensor, left_out_PG: Tensor) -> Tensor:
        """The level of each rank, [P] int64: the one nearest to T_max * min(1, r_d). T_max is the level by which all
        ranks together come nearest to the wanted share. If that lies between two levels, the fuller ranks already have
        the higher one.

        Args:
            loads_P: int64 rows for each rank.
            left_out_PG: int64, what each level would leave out of them, in halves of a row's computation.
        """
        total, ranks = loads_P.sum().clamp(min=1), len(loads_P)
        part_P = (loads_P.double() * ranks / total).clamp(max=1)
        level_GP = torch.bucketize(self._upper_G.unsqueeze(1) * part_P, self._bounds)
        fullest_P = loads_P.argsort(descending=True, stable=True)
        left_out_GP = left_out_PG.t().gather(0, level_GP)[:, fullest_P]
        # From the lowest T_max on, one rank after another gets its next level.
        added_X = torch.cat([left_out_GP[0].sum().view(1), left_out_GP.diff(dim=0).flatten()])
        off = (_MILLIONTHS * added_X.cumsum(0) - 2 * self._wanted * total).abs().tolist()
        best = off.index(min(off))  # of equals the first, which torch's argmin does not promise
        level, already = divmod(best, ranks)
        chosen_P = level_GP[level].clone()
        if already:
            chosen_P[fullest_P[:already]] = level_GP[level + 1][fullest_P[:already]]
        return chosen_P


class LoadAwareRule:
    """An early rule (moe/early.py). Tensor-parallel size 1 and one chunk.

    Args:
        levels: of this layer.
        places: of a rank.
        device: of the layer.

    Attributes:
        chosen: [P] int64 the level of each rank in the last routing.
    """

    def __init__(self, levels: Levels, places: Places, device: torch.device) -> None:
        self.levels, self.places, self.counts = levels, places, DropCounts(device)
        self._skip_G = torch.tensor([each.skip for each in levels.thresholds], dtype=torch.float32, device=device)
        self._halve_G = torch.tensor([each.halve for each in levels.thresholds], dtype=torch.float32, device=device)
        self.chosen = torch.zeros(0, dtype=torch.int64)

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        """[P, X] int64: for each level the rows for each place of the rank; then of every rank this rank's rows for it,
        and the halves that each level leaves out of them."""
        ranks, choices = slices.group_size, routing.choices
        # A choice is computed, or computed whole, at the levels below a number; at none if it is not kept.
        criterion_KT, kept_KT = criterion(routing).contiguous(), choices.kept_KT
        computed_KT, whole_KT = (
            torch.bucketize(criterion_KT, bounds_G, right=True) * (1 if kept_KT is None else kept_KT)
            for bounds_G in (self._skip_G, self._halve_G)
        )
        shape = ranks, self.places.local_experts, len(self.levels)
        computed_PLG = self._at_levels(choices.expert_KT, computed_KT, len(choices.rows_E)).view(shape)
        counts, halves = [computed_PLG], self.places.halves == 2
        if halves:
            whole_PLG = self._at_levels(choices.expert_KT, whole_KT, len(choices.rows_E)).view(shape)
            counts = [whole_PLG, computed_PLG - whole_PLG]
        rank_KT = self._rank_of(choices.expert_KT)
        if one_row_per_rank(len(rank_KT), slices):
            counts.append(self._tokens_at_levels(rank_KT, computed_KT, ranks).unsqueeze(1))
        loads_P = choices.rows_E.view(ranks, -1).sum(1)
        left_out_PG = 2 * loads_P.unsqueeze(1) - computed_PLG.sum(1) - (whole_PLG if halves else computed_PLG).sum(1)
        of_all = torch.cat([loads_P, left_out_PG.flatten()])
        return torch.cat([torch.cat(counts, dim=1).transpose(1, 2).flatten(1), of_all.expand(ranks, -1)], dim=1)

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        """The choices that each rank's level leaves. Known without another exchange: what this rank sends and gets."""
        ranks, rank = slices.group_size, slices.rank
        of_all = ranks * (1 + len(self.levels))
        loads_P, left_out_X = told_PX[:, -of_all:].sum(0).split([ranks, of_all - ranks])
        self.chosen = chosen_P = self.levels.of_ranks(loads_P, left_out_X.view(ranks, -1))
        own_PGY, told_PGY = (each[:, :-of_all].unflatten(1, (len(self.levels), -1)) for each in (own_PX, told_PX))
        sent_PY, received_PY = own_PGY[torch.arange(ranks), chosen_P], told_PGY[:, chosen_P[rank]]
        level_P = to_device(chosen_P, routing.choices.expert_KT.device)
        rank_KT = self._rank_of(routing.choices.expert_KT)
        skip_KT, halve_KT = (bounds_G.take(level_P).take(rank_KT) for bounds_G in (self._skip_G, self._halve_G))
        dropped = drop(routing, skip_KT, halve_KT, self.places, ranks)
        self.counts.add(routing, dropped, self.places)
        return Decision(dropped, (sent_PY, received_PY))

    def _rank_of(self, expert_KT: Tensor) -> Tensor:
        return expert_KT.div(self.places.local_experts, rounding_mode="floor")

    def _at_levels(self, expert_KT: Tensor, below_KT: Tensor, experts: int) -> Tensor:
        """[E, G] int64 of choices, each of which counts at the levels below a number."""
        number_EG = expert_KT.new_zeros(experts * (len(self.levels) + 1))
        key_X = (expert_KT * (len(self.levels) + 1) + below_KT).flatten()
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
