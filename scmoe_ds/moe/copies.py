"""Copies of hot experts on other ranks: which experts to copy, and how to divide the rows of one step among copies.

EPLB (DeepSeek-V3's load balancer) copies the experts with the greatest loads, and guesses from past loads how rows will
divide. Here past loads choose the copies alone. The rows of a step are divided when all ranks know all row counts of
this step, so that nothing is guessed. Both functions are pure: every rank computes the same from the same numbers.

An expert lives on its home rank, and wherever it has a copy; each of these is an instance of it.

Shape suffixes: P ranks (that send), E experts, N copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GAIN = 0.02
"""A division of rows that lowers the greatest cost of a rank by less is not worth its copies."""


class Copy(NamedTuple):
    """An expert (its global number) that another rank than its home holds as well."""

    expert: int
    rank: int


class Costs(NamedTuple):
    """What rows cost on this machine and link, in milliseconds. Only their ratios matter.

    Attributes:
        expert_ms: an expert with any rows at all: its weights are read.
        row_ms: each of its rows.
        travel_ms: a row that comes from another rank and goes back.
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
    limit, found = (1 - GAIN) * max(home.cost_P), None
    for start in (near, home):
        start.level()
        if max(start.cost_P) < limit:
            limit, found = max(start.cost_P), [start.rows_IP[number] for number in start.copies]
    return found


class _Division:
    """Rows divided among the instances of the copied experts. Those of other experts stay at home.

    Attributes:
        rank_I: rank of each instance.
        rows_IP: rows of each instance by sender.
        copies: the instance that each copy is.
        cost_P: milliseconds of each rank.
    """

    def __init__(self, rows_PE: Sequence[Sequence[int]], copies: Sequence[Copy], costs: Costs) -> None:
        ranks, local_experts = len(rows_PE), len(rows_PE[0]) // len(rows_PE)
        self.costs = costs
        self.cost_P = [0.0] * ranks
        for expert, rows_P in enumerate(zip(*rows_PE, strict=True)):
            self.cost_P[expert // local_experts] += self._cost(expert // local_experts, rows_P)
        copied = sorted({copy.expert for copy in copies})
        self.rank_I = [expert // local_experts for expert in copied] + [copy.rank for copy in copies]
        self.copies = range(len(copied), len(self.rank_I))
        self.rows_IP = [[rows_E[expert] for rows_E in rows_PE] for expert in copied] + [[0] * ranks for _ in copies]
        of_expert = copied + [copy.expert for copy in copies]
        self._others = [
            [other for other, same in enumerate(of_expert) if same == expert and other != instance]
            for instance, expert in enumerate(of_expert)
        ]

    def copied(self) -> _Division:
        """One that is divided apart from this one."""
        other = object.__new__(_Division)
        other.__dict__ |= self.__dict__
        other.rows_IP, other.cost_P = [list(rows_P) for rows_P in self.rows_IP], list(self.cost_P)
        return other

    def _cost(self, rank: int, rows_P: Sequence[int]) -> float:
        """Of an instance."""
        rows = sum(rows_P)
        if not rows:
            return 0.0
        expert_ms, row_ms, travel_ms = self.costs
        return expert_ms + rows * row_ms + (rows - rows_P[rank]) * travel_ms

    def send_home_rows_to_own_copies(self) -> None:
        """Every sender's rows go to its own copy, if it has one."""
        for copy in self.copies:
            rank = self.rank_I[copy]
            home = min(self._others[copy])
            self._move(home, copy, {rank: self.rows_IP[home][rank]})

    def level(self) -> None:
        """Moves rows away from the costliest rank until that lowers its cost no longer."""
        ranks = len(self.cost_P)
        for _ in range(4 * ranks * max(len(self.copies), 1)):
            costliest = max(range(ranks), key=self.cost_P.__getitem__)
            before = self.cost_P[costliest]
            if before * (1 - GAIN / 4) <= sum(self.cost_P) / ranks:
                return
            moves = [
                self._pour(instance, other)
                for instance, rank in enumerate(self.rank_I)
                if rank == costliest and any(self.rows_IP[instance])
                for other in self._others[instance]
                if self.cost_P[self.rank_I[other]] < before
            ]
            after, source, target, taken = min(moves, key=lambda move: move[0], default=(before, 0, 0, {}))
            if not taken or after >= before * (1 - GAIN / 100):
                return
            self._move(source, target, taken)

    def _pour(self, source: int, target: int) -> tuple[float, int, int, dict[int, int]]:
        """As many rows as make two ranks' costs equal: the greater cost then, the instances, and rows by sender.

        First the rows whose sender is the target: they need not travel any more. The source's own rows are last.
        """
        ranks, rows_P = (self.rank_I[source], self.rank_I[target]), self.rows_IP[source]
        order = sorted(range(len(rows_P)), key=lambda sender: (sender == ranks[0]) - (sender == ranks[1]))
        _, row_ms, travel_ms = self.costs
        left, got = self.cost_P[ranks[0]], self.cost_P[ranks[1]]
        got += 0 if any(self.rows_IP[target]) else self.costs.expert_ms
        taken: dict[int, int] = {}
        for sender in order:
            lost, added = (row_ms + travel_ms * (sender != rank) for rank in ranks)
            rows = min(rows_P[sender], max(0, int((left - got) / (lost + added))))
            if rows:
                left, got, taken[sender] = left - rows * lost, got + rows * added, rows
        if sum(taken.values()) == sum(rows_P):
            left -= self.costs.expert_ms
        return max(left, got), source, target, taken

    def _move(self, source: int, target: int, taken: dict[int, int]) -> None:
        for instance, sign in ((source, -1), (target, 1)):
            rank, rows_P = self.rank_I[instance], self.rows_IP[instance]
            self.cost_P[rank] -= self._cost(rank, rows_P)
            for sender, rows in taken.items():
                rows_P[sender] += sign * rows
            self.cost_P[rank] += self._cost(rank, rows_P)
