"""Which experts are copied, and how rows divide among copies: against all possible divisions of small cases."""

from __future__ import annotations

import itertools
import random

import pytest

from scmoe_ds.moe.decisions.copies import Copy, Costs, choose_copies, split_rows

Rows = list[list[int]]


def greatest_cost(rows_PE: Rows, copies: list[Copy], costs: Costs, split_NP: Rows) -> float:
    """Of a rank, row by row; infinite where more rows have gone to copies than there are."""
    ranks, local_experts = len(rows_PE), len(rows_PE[0]) // len(rows_PE)
    at_home = {(s, e): rows for s, rows_E in enumerate(rows_PE) for e, rows in enumerate(rows_E)}
    for copy, rows_P in zip(copies, split_NP, strict=True):
        for sender, rows in enumerate(rows_P):
            at_home[sender, copy.expert] -= rows
    if min(at_home.values()) < 0:
        return float("inf")
    instances = [(e // local_experts, [at_home[s, e] for s in range(ranks)]) for e in range(len(rows_PE[0]))] + [
        (copy.rank, rows_P) for copy, rows_P in zip(copies, split_NP, strict=True)
    ]
    compute_P, sent_P, received_P = [0.0] * ranks, [0] * ranks, [0] * ranks
    for rank, rows_P in instances:
        compute_P[rank] += costs.expert_ms * (sum(rows_P) > 0) + sum(rows_P) * costs.row_ms
        for sender, rows in enumerate(rows_P):
            sent_P[sender] += rows * (sender != rank)
            received_P[rank] += rows * (sender != rank)
    return max(
        compute + costs.travel_ms * max(sent, received)
        for compute, sent, received in zip(compute_P, sent_P, received_P, strict=True)
    )


def all_splits(rows_PE: Rows, copies: list[Copy]) -> list[Rows]:
    each = [itertools.product(*(range(rows_E[copy.expert] + 1) for rows_E in rows_PE)) for copy in copies]
    return [[list(rows_P) for rows_P in found] for found in itertools.product(*each)]


def random_case(draw: random.Random) -> tuple[Rows, list[Copy], Costs]:
    ranks, local_experts = draw.choice([2, 2, 3]), draw.choice([1, 2])
    rows_PE = [[draw.randrange(4) for _ in range(ranks * local_experts)] for _ in range(ranks)]
    found = set()
    for _ in range(draw.choice([1, 2]) if ranks == 2 else 1):
        expert = draw.randrange(ranks * local_experts)
        found.add(Copy(expert, draw.choice([rank for rank in range(ranks) if rank != expert // local_experts])))
    return rows_PE, sorted(found), Costs(draw.choice([0.0, 1.0, 5.0]), 1.0, draw.choice([0.0, 0.5, 3.0]))


def test_split_against_all_possible_ones() -> None:
    draw, as_good = random.Random(1), 0
    for _ in range(150):
        rows_PE, copies, costs = random_case(draw)
        none = [[0] * len(rows_PE) for _ in copies]
        split = split_rows(rows_PE, copies, costs)
        found, at_home = (greatest_cost(rows_PE, copies, costs, each) for each in (split or none, none))
        best = min(greatest_cost(rows_PE, copies, costs, each) for each in all_splits(rows_PE, copies))
        one_row = costs.row_ms + costs.travel_ms
        assert best <= found <= min(at_home, best + one_row), (rows_PE, copies, costs, split)
        assert (split is None) == (found == at_home)
        as_good += found == best
    assert as_good >= 140


def test_split_of_many_ranks() -> None:
    """No row is lost, nothing is worse than at home, and the greatest load comes near the mean."""
    draw = random.Random(2)
    for ranks, room in itertools.product((2, 4, 8), (1, 2)):
        experts, costs = 4 * ranks, Costs(20.0, 1.0, 0.5)
        weights = [4.0 * ranks if expert == 1 else draw.uniform(0.5, 1.5) for expert in range(experts)]
        rows_PE = [[int(100 * weight * draw.uniform(0.8, 1.2)) for weight in weights] for _ in range(ranks)]
        copies = choose_copies([sum(rows_P) for rows_P in zip(*rows_PE, strict=True)], ranks, room)
        split = split_rows(rows_PE, copies, costs)
        assert split is not None and min(map(min, split)) >= 0
        none = [[0] * ranks for _ in copies]
        found, at_home = (greatest_cost(rows_PE, copies, costs, each) for each in (split, none))
        assert found < 0.7 * at_home


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_few_rows_stay_at_home(rows: int) -> None:
    """An expert's weights are read once more for a copy: rows that take less time do not move."""
    rows_PE = [[rows, 1, 1, 0], [rows, 0, 0, 1]]
    assert split_rows(rows_PE, [Copy(0, 1), Copy(2, 0)], Costs(10.0, 1.0, 0.0)) is None
    assert split_rows(rows_PE, [], Costs(0.0, 1.0, 0.0)) is None


def test_senders_prefer_their_own_copy() -> None:
    assert split_rows([[8, 0], [8, 0]], [Copy(0, 1)], Costs(0.0, 1.0, 1.0)) == [[0, 8]]


def test_chosen_copies() -> None:
    assert choose_copies([9, 1, 1, 1], 2, 1) == [Copy(2, 0), Copy(0, 1)]
    assert choose_copies([0, 0, 5, 0], 2, 2) == [Copy(2, 0)]
    assert choose_copies([0, 0, 0, 0], 2, 1) == []
    assert choose_copies([12, 0, 1, 0, 2, 0, 3, 0], 4, 1) == [Copy(6, 0), Copy(0, 1), Copy(0, 2), Copy(0, 3)]
    draw = random.Random(3)
    for _ in range(100):
        ranks, local_experts, room = draw.choice([2, 4, 8]), draw.choice([1, 2, 4]), draw.choice([1, 2, 3])
        copies = choose_copies([draw.randrange(5) for _ in range(ranks * local_experts)], ranks, room)
        assert len(set(copies)) == len(copies)
        assert all(copy.expert // local_experts != copy.rank for copy in copies)
        assert max([sum(copy.rank == rank for copy in copies) for rank in range(ranks)]) <= room
        assert [copy.rank for copy in copies] == sorted(copy.rank for copy in copies)
