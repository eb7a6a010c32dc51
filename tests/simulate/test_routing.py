"""Loads of ranks: draws of a fair gate, skews, and counts of a run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest

from scmoe_ds.errors import ArgumentError
from scmoe_ds.simulate.routing import EVEN, Routing, expected_largest, routing_of


def test_the_largest_of_some_normal_numbers() -> None:
    # From tables: 1/√π, 3/(2√π), and Tippett's for 8 and 1000.
    for count, value in (
        (1, 0.0),
        (2, 1 / math.sqrt(math.pi)),
        (3, 1.5 / math.sqrt(math.pi)),
        (8, 1.42360),
        (1000, 3.24144),
    ):
        assert expected_largest(count) == pytest.approx(value, abs=1e-5)


def test_a_fair_gate_is_uneven_by_chance() -> None:
    chance, ranks, rows = random.Random(0), 8, 256
    busiest = []
    for _ in range(150):
        counts = [0] * ranks
        for _ in range(ranks * rows):
            counts[chance.randrange(ranks)] += 1
        busiest.append(max(counts) / rows)
    expected = Routing().loads(rows, ranks, ranks, ranks).busiest
    assert expected - 1 == pytest.approx(fmean(busiest) - 1, rel=0.12)


def test_without_other_ranks_all_is_even() -> None:
    for routing in (Routing(), Routing(skew=3.0), Routing(counts=((1.0, 9.0),))):
        assert routing.loads(1024, 1, 1, 2) == EVEN


def test_loads_keep_the_mean() -> None:
    for routing in (Routing(), Routing(skew=3.0), Routing(counts=((1.0, 9.0, 2.0, 4.0, 0.0, 8.0, 8.0, 8.0),))):
        loads = routing.loads(1024, 4, 2, 8)
        assert sum(loads.shares) == pytest.approx(1)
        assert sum(share * factor for share, factor in zip(loads.shares, loads.factors, strict=True)) == pytest.approx(
            1
        )
        assert 1 <= loads.busiest_node <= loads.busiest <= 4


def test_a_skew_is_the_busiest_over_the_mean() -> None:
    loads = Routing(skew=2.0).loads(1024, 8, 4, 8)
    assert loads.busiest == 2.0
    # The busiest rank's node has three others with 6/7 each.
    assert loads.busiest_node == pytest.approx((2 + 3 * 6 / 7) / 4)
    assert Routing(skew=100.0).loads(1024, 8, 4, 8).busiest == 8  # one rank has all rows


def test_experts_lie_on_the_ranks_in_order() -> None:
    counts = (10.0, 30.0, 5.0, 5.0, 5.0, 5.0, 20.0, 0.0)
    loads = Routing(counts=(counts,)).loads(1024, 4, 2, 8)
    assert loads.busiest == pytest.approx(40 / 20) and loads.busiest_node == pytest.approx(50 / 40)
    assert Routing(counts=((1.0,) * 8, counts)).loads(1, 4, 2, 8).busiest == 1.0
    both = Routing(counts=((1.0,) * 8, counts)).loads(1, 4, 2, 8, layers=range(2))
    assert both.busiest == pytest.approx((1 + 2) / 2)
    with pytest.raises(ArgumentError, match="counts of 8 experts: the model's MoE layer has 16 on 4 ranks"):
        Routing(counts=(counts,)).loads(1024, 4, 2, 16)
    halves = Routing(counts=((30.0, 10.0),)).loads(1024, 4, 2, 2, parts=2)  # two ranks for the parts of each expert
    assert halves.busiest == halves.busiest_node == pytest.approx(30 / 20)
    together, apart = (Routing().loads(1024, 4, 2, experts, parts=2).busiest for experts in (4, 2))
    assert together > apart == Routing().loads(1024, 4, 2, 4).busiest  # two parts on one rank are one draw


def test_what_a_user_writes(tmp_path: Path) -> None:
    assert routing_of("uniform") == Routing() and routing_of("1.5") == Routing(skew=1.5)
    log = tmp_path / "log.jsonl"
    steps = [{"kind": "step", "expert_load": load} for load in ([[0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]])]
    log.write_text("\n".join(map(json.dumps, [{"kind": "start"}, *steps])) + '\n{"kind": "step", "expert_load"')
    assert routing_of(str(log)) == Routing(counts=((0.25, 0.75), (0.5, 0.5)))
    counts = tmp_path / "counts.json"
    counts.write_text("[3, 1]")
    assert routing_of(str(counts)) == Routing(counts=((3.0, 1.0),))
    counts.write_text("[[3, 1], [2, 2]]")
    assert routing_of(str(counts)) == Routing(counts=((3.0, 1.0), (2.0, 2.0)))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0.5", "the busiest rank has at least the mean; give a number from 1 on"),
        ("nan", "the busiest rank has at least the mean"),
        ("no/such/file", 'must be "uniform", a number, or a file that can be read'),
    ],
)
def test_what_a_user_cannot_write(text: str, rule: str) -> None:
    with pytest.raises(ArgumentError, match=f"routing = {text}: {rule}"):
        routing_of(text)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[0, 0]",
        "[[1], []]",
        '{"a": 1}',
        "[1, -1]",
        '["a"]',
        "[true, 1]",
        "nonsense",
        "[1, NaN]",
        "[" * 100_000,
    ],
    ids=lambda content: content[:9],
)
def test_a_file_without_counts(content: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(content)
    with pytest.raises(ArgumentError, match="has no rows of experts; give a log"):
        routing_of(str(path))
