"""Copies of hot experts on other ranks: which experts to copy, and how to divide the rows of one step among copies.

EPLB (DeepSeek-V3's load balancer) copies the experts with the greatest loads, and guesses from past loads how rows will
divide. Here past loads choose the copies alone. The rows of a step are divided when all ranks know all row counts of
this step, so that nothing is guessed. Both functions are pure: every rank computes the same from the same numbers.

An expert lives on its home rank, and wherever it has a copy; each of these is an instance of it.

Shape suffixes: P ranks (that send), E experts, N copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

GAIN, STEP = 0.05, 0.01
"""A division of rows that lowers the greatest cost of a rank by less is not worth its copies; nor a move of rows."""


class Copy(NamedTuple):
    """An expert (its global number) that another rank than its home holds as well."""

    expert: int
    rank: int


class Costs(NamedTuple):
    """What rows cost on this machine and link, in milliseconds. Only their ratios matter.

    Attributes:
        expert_ms: an expert with any rows at all: its weights are read.
        row_ms: each of its rows.
        travel_ms: a row that goes to another rank and comes back.
    """

    expert_ms: float
    row_ms: float
    travel_ms: float


def choose_copies(loads_E: Sequence[float], ranks: int, copies_per_rank: int) -> list[Copy]:
    """Which experts to copy to which ranks, from loads of the past.

    The next expert is the one with the greatest load per instance. The next rank is the one with the least load among
    those that have room and do not hold the expert. Loads divide evenly among instances, as nothing else is known yet.

    Args:
        loads_E: rows of each expert.
        ranks: of the expert-parallel group; each is the home of as many experts.
        copies_per_rank: room of each rank.

    Returns:
        the copies by rank; fewer than there is room for when experts without any load are left.
    """
    local_experts = len(loads_E) // ranks
    holders = [{expert // local_experts} for expert in range(len(loads_E))]
    room = [copies_per_rank] * ranks
    copies: list[Copy] = []
    while True:
        load_P = [0.0] * ranks
        for load, held in zip(loads_E, holders, strict=True):
            for rank in held:
                load_P[rank] += load / len(held)
        open_to = [[rank for rank in range(ranks) if room[rank] and rank not in held] for held in holders]
        experts = [expert for expert, found in enumerate(open_to) if found and loads_E[expert] > 0]
        if not experts:
            return sorted(copies, key=lambda each: each.rank)
        hottest = max(experts, key=lambda expert: loads_E[expert] / len(holders[expert]))
        rank = min(open_to[hottest], key=lambda each: load_P[each])
        copies.append(Copy(hottest, rank))
        holders[hottest].add(rank)
        room[rank] -= 1


def split_rows(rows_PE: Sequence[Sequence[int]], copies: Sequence[Copy], costs: Costs) -> list[list[int]] | None:
    """How many rows of each rank go to each copy, such that the greatest cost of a rank becomes small.

    From two starts, all rows at home and all rows at the sender's own copy where it has one, rows of the costliest rank
    go to the instance that lowers its cost most, until nothing lowers it. The better result counts.

    Args:
        rows_PE: rows that each rank sends to each expert in this step.
        copies: of `choose_copies`.
        costs: of this machine.

    Returns:
        [N, P] rows of each copy by sender, the others stay at home; None: all stay at home, as copies would not make
        the greatest cost smaller by `GAIN`.
    """
    if not copies:
        return None
    home = _Division(rows_PE, copies, costs)
    near = home.copied()
    near.send_home_rows_to_own_copies()
    limit, found = (1 - GAIN) * max(home.costs_P()), None
    for start in (near, home):
        start.level()
        if max(start.costs_P()) < limit:
            limit, found = max(start.costs_P()), [start.rows_IP[number] for number in start.copies]
    return found


class _Division:
    """Rows divided among the instances of the copied experts; rows of other experts stay at home.

    The cost of a rank is the time to compute its rows, and to send or to get rows, whichever are more: both directions
    of a link work at the same time.

    Attributes:
        rank_I: rank of each instance.
        rows_IP: rows of each instance by sender.
        copies: the instance that each copy is.
        load_P: of each rank.
    """

    def __init__(self, rows_PE: Sequence[Sequence[int]], copies: Sequence[Copy], costs: Costs) -> None:
        ranks, local_experts = len(rows_PE), len(rows_PE[0]) // len(rows_PE)
        self.costs = costs
        self.load_P = [_Load() for _ in range(ranks)]
        columns = list(zip(*rows_PE, strict=True))
        for expert, rows_P in enumerate(columns):
            self._count(expert // local_experts, rows_P)
        copied = sorted({copy.expert for copy in copies})
        self.rank_I = [expert // local_experts for expert in copied] + [copy.rank for copy in copies]
        self.copies = range(len(copied), len(self.rank_I))
        self.rows_IP = [list(columns[expert]) for expert in copied] + [[0] * ranks for _ in copies]
        of_expert = copied + [copy.expert for copy in copies]
        self._others = [
            [other for other, same in enumerate(of_expert) if same == expert and other != instance]
            for instance, expert in enumerate(of_expert)
        ]

    def copied(self) -> _Division:
        """One that is divided apart from this one."""
        other = object.__new__(_Division)
        other.__dict__ |= self.__dict__
        other.rows_IP, other.load_P = [list(rows_P) for rows_P in self.rows_IP], [replace(each) for each in self.load_P]
        return other

    def costs_P(self) -> list[float]:
        """Milliseconds of each rank."""
        return [load.cost(self.costs) for load in self.load_P]

    def _count(self, rank: int, rows_P: Sequence[int], sign: int = 1) -> None:
        """Adds an instance's rows to the loads, or takes them away."""
        rows = sum(rows_P)
        if not rows:
            return
        load = self.load_P[rank]
        load.computes_ms += sign * (self.costs.expert_ms + rows * self.costs.row_ms)
        load.received += sign * (rows - rows_P[rank])
        for sender, each in enumerate(rows_P):
            if sender != rank:
                self.load_P[sender].sent += sign * each

    def send_home_rows_to_own_copies(self) -> None:
        """Every sender's rows go to its own copy, if it has one."""
        for copy in self.copies:
            rank = self.rank_I[copy]
            home = min(self._others[copy])
            self._move(home, copy, {rank: self.rows_IP[home][rank]})

    def level(self) -> None:
        """Moves rows away from the costliest rank until that no longer lowers the greatest cost."""
        ranks = len(self.load_P)
        for _ in range(4 * ranks):
            cost_P = self.costs_P()
            before = max(cost_P)
            if before * (1 - GAIN / 2) <= sum(cost_P) / ranks:
                return
            costliest = cost_P.index(before)
            targets = {
                instance: min(self._others[instance], key=lambda other: cost_P[self.rank_I[other]])
                for instance, rank in enumerate(self.rank_I)
                if rank == costliest and any(self.rows_IP[instance])
            }
            moves = [self._pour(*each) for each in targets.items()]
            after, source, target, taken = min(moves, key=lambda move: move[0], default=(before, 0, 0, {}))
            if not taken or after >= before * (1 - STEP):
                return
            self._move(source, target, taken)

    def _pour(self, source: int, target: int) -> tuple[float, int, int, dict[int, int]]:
        """Tries to move rows until two ranks' costs are equal; changes nothing.

        First go the rows that the target's own rank sends, which then need not travel. The source's own rows go last.

        Returns:
            the greater of the two costs after the move, both instances, and the moved rows by sender.
        """
        ranks, rows_P = (self.rank_I[source], self.rank_I[target]), self.rows_IP[source]
        order = [ranks[1], *(sender for sender in range(len(rows_P)) if sender not in ranks), ranks[0]]
        left, got = (replace(self.load_P[rank]) for rank in ranks)
        got.computes_ms += 0 if any(self.rows_IP[target]) else self.costs.expert_ms
        taken: dict[int, int] = {}
        for sender in order:
            rows = rows_P[sender]
            while rows and (step := self._step(left, got, rows, sender == ranks[0], sender == ranks[1])):
                left.change(-step, sender == ranks[0], self.costs)
                got.change(step, sender == ranks[1], self.costs)
                rows, taken[sender] = rows - step, taken.get(sender, 0) + step
        if sum(taken.values()) == sum(rows_P):
            left.computes_ms -= self.costs.expert_ms
        return max(left.cost(self.costs), got.cost(self.costs)), source, target, taken

    def _step(self, left: _Load, got: _Load, rows: int, from_left: bool, from_got: bool) -> int:
        """How many of a sender's rows to move at once: until both costs are equal, or the slope of either changes."""
        falls, until = left.slope(-1, from_left, self.costs)
        rises, other = got.slope(1, from_got, self.costs)
        gap = left.cost(self.costs) - got.cost(self.costs)
        if falls >= 0 or gap <= 0:
            return 0
        return int(min(rows, until, other, gap / (rises - falls) if rises > falls else rows))

    def _move(self, source: int, target: int, taken: dict[int, int]) -> None:
        for instance, sign in ((source, -1), (target, 1)):
            rank, rows_P = self.rank_I[instance], self.rows_IP[instance]
            self._count(rank, rows_P, -1)
            for sender, rows in taken.items():
                rows_P[sender] += sign * rows
            self._count(rank, rows_P)


@dataclass
class _Load:
    """Of a rank: milliseconds of its experts, rows that it sends to other ranks, rows that it gets from them."""

    computes_ms: float = 0.0
    sent: int = 0
    received: int = 0

    def cost(self, costs: Costs) -> float:
        """Milliseconds."""
        return self.computes_ms + costs.travel_ms * max(self.sent, self.received)

    def change(self, rows: int, own: bool, costs: Costs) -> None:
        """Adds rows to what the rank computes (a negative number takes them away). Own ones need not be sent any more,
        and those of another rank come in addition."""
        self.computes_ms += rows * costs.row_ms
        self.sent -= rows * own
        self.received += rows * (not own)

    def slope(self, sign: int, own: bool, costs: Costs) -> tuple[float, float]:
        """How steeply the cost changes with each row that `change` adds (sign 1) or takes away (-1), in milliseconds a
        row, and for how many rows that holds."""
        more = self.sent if own else self.received
        less = self.received if own else self.sent
        direction = -sign if own else sign
        bends = direction * (less - more)  # rows until the other of the two is the larger one
        travels = more > less or (more == less and direction > 0)
        slope = sign * costs.row_ms + (direction * costs.travel_ms if travels else 0.0)
        return slope, bends if bends > 0 else math.inf
