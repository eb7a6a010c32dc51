"""Rows of hot experts on their way to copies: the early rule of a layer that has some (scmoe_ds.moe.decisions.copies).

Every rank tells every other one how many rows it has for each expert. It does so in the place of the row counts, so
that no collective is added. From the same numbers all ranks compute the same division of rows, and with one routed
expert per token also the row counts that the exchange needs. With several, a token has one row for all experts of a
rank: if rows have moved, these are counted in one further small exchange.

The copies are the last places of a rank: of its L + C places the first L are its own experts'.

Shape suffixes: T tokens, K choices of a token, E experts, L experts of a rank, P ranks, S senders, N copies, X numbers
of a notice, Y places of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.moe.decisions.copies import Copy, Costs, split_rows
from scmoe_ds.moe.early import Decision, EarlyRule, rerouted
from scmoe_ds.moe.exchange import one_row_per_rank
from scmoe_ds.moe.experts import to_device
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.slices import TokenSlices

MEASURED_ROWS = 32
"""Rows of an expert, on average, after which loads are known well enough to choose copies by."""


@dataclass
class Loads:
    """Rows of a layer, in the passes that it had copies.

    Attributes:
        rows, moved: of all ranks; those that went to a copy.
        greatest_before, greatest: of a rank, summed over passes: with all rows at home, and as they were computed.
    """

    rows: int = 0
    moved: int = 0
    greatest_before: int = 0
    greatest: int = 0

    def add(self, home_P: Tensor, rows_P: Tensor, moved: int) -> None:
        """Counts a pass, from [P] rows of each rank."""
        self.rows += int(rows_P.sum())
        self.moved += moved
        self.greatest_before += int(home_P.max())
        self.greatest += int(rows_P.max())


class CopiedExperts(EarlyRule):
    """Sends rows of hot experts to copies.

    Args:
        room: C, the copies that every rank has room for.
        costs: of `split_rows`.
        ranks: of the expert-parallel group.
        choose: is handed [E] rows of each expert when enough are counted, on all ranks in the same pass. It brings the
            copies' weights to this rank and returns the copies of all ranks, those of a rank in the order of its
            places. It may communicate.
        split: divides rows, see `split_rows`.

    Attributes:
        counted_E: rows of each expert since the beginning, of all ranks; None before the first pass.
        copies: of all ranks; None while loads are counted.
        loads: of the passes with copies.
    """

    def __init__(
        self,
        room: int,
        costs: Costs,
        ranks: int,
        choose: Callable[[Sequence[float]], Sequence[Copy]],
        split: Callable[[list[list[int]], Sequence[Copy], Costs], list[list[int]] | None] = split_rows,
    ) -> None:
        self.room, self.costs, self.ranks, self.choose, self.split = room, costs, ranks, choose, split
        self.counted_E: Tensor | None = None
        self.copies: Sequence[Copy] | None = None
        self.loads = Loads()

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        """[P, E] int64, the same for each rank: this rank's rows for each expert. Where a token has one row per rank,
        [P, E + P]: then also how many tokens it has for each rank."""
        rows_E, ranks = routing.choices.rows_E, slices.group_size
        if one_row_per_rank(len(routing.weight_KT), slices):
            rows_E = torch.cat([rows_E, _tokens_per_rank(routing, ranks)])
        return rows_E.expand(ranks, -1)

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        """See `EarlyRule`."""
        experts = len(routing.choices.rows_E)
        rows_SE, tokens_SP = told_PX[:, :experts], told_PX[:, experts:]
        rows_E = rows_SE.sum(0)
        self.counted_E = rows_E if self.counted_E is None else self.counted_E + rows_E
        if self.copies is None and int(self.counted_E.sum()) >= MEASURED_ROWS * experts:
            self.copies = self.choose(self.counted_E.tolist())
        split_NS = self.split(rows_SE.tolist(), self.copies, self.costs) if self.copies else None
        rows_SPY = self._rows(rows_SE, split_NS)
        routing = self._to_places(routing, rows_SE[slices.rank], split_NS, slices)
        if not tokens_SP.numel():
            return Decision(routing, (rows_SPY[slices.rank], rows_SPY[:, slices.rank]))
        if split_NS is not None:
            return Decision(routing, None)
        sent_PX = torch.cat([rows_SPY[slices.rank], tokens_SP[slices.rank].unsqueeze(1)], 1)
        return Decision(routing, (sent_PX, torch.cat([rows_SPY[:, slices.rank], tokens_SP[:, slices.rank, None]], 1)))

    def _rows(self, rows_SE: Tensor, split_NS: list[list[int]] | None) -> Tensor:
        """[S, P, Y] rows of every place by sender."""
        ranks = len(rows_SE)
        home_SPL = rows_SE.view(ranks, ranks, -1)
        rows_SPY = F.pad(home_SPL, (0, self.room))
        moved = 0
        for (rank, place, home), rows_S in zip(self._places(home_SPL.shape[2]), split_NS or [], strict=False):
            taken_S = torch.tensor(rows_S)
            rows_SPY[:, rank, place] = taken_S
            rows_SPY.view(ranks, -1)[:, home] -= taken_S
            moved += sum(rows_S)
        if self.copies:
            self.loads.add(home_SPL.sum((0, 2)), rows_SPY.sum((0, 2)), moved)
        return rows_SPY

    def _places(self, local_experts: int) -> list[tuple[int, int, int]]:
        """Of each copy: its rank, its place among those of that rank, and the place of its expert at home among all
        places."""
        found, used = [], dict[int, int]()
        for copy in self.copies or ():
            place = local_experts + used.setdefault(copy.rank, 0)
            used[copy.rank] += 1
            found.append((copy.rank, place, self._at_home(copy.expert, local_experts)))
        return found

    def _at_home(self, expert: int, local_experts: int) -> int:
        return expert // local_experts * (local_experts + self.room) + expert % local_experts

    def _to_places(
        self, routing: Routing, rows_E: Tensor, split_NS: list[list[int]] | None, slices: TokenSlices
    ) -> Routing:
        """The routing to places. An expert's rows are taken in their order: the first ones stay at home, the last ones
        go to its copies."""
        choices, ranks, local_experts = routing.choices, slices.group_size, len(rows_E) // slices.group_size
        if split_NS is None or not any(rows_S[slices.rank] for rows_S in split_NS):  # the order stays
            rows_PY = F.pad(choices.rows_E.view(ranks, -1), (0, self.room))
            place_KT = choices.expert_KT + choices.expert_KT.div(local_experts, rounding_mode="floor") * self.room
            return replace(routing, choices=replace(choices, expert_KT=place_KT, rows_E=rows_PY.flatten()))
        assert self.copies is not None
        runs: list[list[tuple[int, int]]] = [[] for _ in rows_E]  # places and rows of each expert
        left = rows_E.tolist()
        for copy, (rank, place, _), rows_S in zip(self.copies, self._places(local_experts), split_NS, strict=True):
            runs[copy.expert].append((rank * (local_experts + self.room) + place, rows_S[slices.rank]))
            left[copy.expert] -= rows_S[slices.rank]
        for expert, rows in enumerate(left):
            runs[expert].insert(0, (self._at_home(expert, local_experts), rows))
        ordered = [run for of_expert in runs for run in of_expert if run[1]]
        total = choices.expert_KT.numel()
        ordered.append((0, total - sum(rows for _, rows in ordered)))  # choices that are not kept
        place_R, rows_R = to_device(torch.tensor(ordered).t().contiguous(), choices.expert_KT.device)
        place_X = place_R.repeat_interleave(rows_R, output_size=total)
        return rerouted(routing, place_X[choices.order.place_KT], choices.kept_KT, ranks * (local_experts + self.room))


def _tokens_per_rank(routing: Routing, ranks: int) -> Tensor:
    """[P] int64 tokens with any choice of each rank."""
    choices = routing.choices
    rank_KT = choices.expert_KT.div(len(choices.rows_E) // ranks, rounding_mode="floor")
    if choices.kept_KT is not None:
        rank_KT = torch.where(choices.kept_KT, rank_KT, ranks)
    has_PT = torch.zeros(ranks + 1, rank_KT.shape[1], dtype=torch.int64, device=rank_KT.device)
    return has_PT.scatter_(0, rank_KT, 1)[:ranks].sum(1)
