"""What converting a layer saves, against a computation by hand; the choice for a budget, against all sets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from scmoe_ds.analysis.adaptation_choice import Budget, Choice, Chooser, Cost, best, front
from scmoe_ds.analysis.adaptation_times import LayerTime, Shape, Way, hidden_share, layer_time
from scmoe_ds.analysis.feasibility import Times
from scmoe_ds.planner.simulation import Simulated
from scmoe_ds.planner.times import OperatorTimes
from tests.analysis.test_feasibility import POS2, entry

POS1_END, POS2_END, POS2_LATE = Way("pos1", "end"), Way("pos2", "end"), Way("pos2", "late")


def times(*operators: str) -> Times:
    made = entry(*operators)
    return Times({}, [(made["description"], OperatorTimes.model_validate(made["times"]))])


# Gate 1 + 1 ms, each transfer 5, experts 3 + 6 by top-1, attention 6 + 10, MLP and shared expert 4 + 8.
@pytest.mark.parametrize(
    ("way", "layer", "top_k", "shared", "before_ms", "after_ms", "exposed_ms"),
    [
        # Top-2 without a shared expert: everything of the exchange twice, and waited for. One of 20 ms stays exposed.
        (POS1_END, 0, (2, 1), (False, True), 2 + 16 + 18 + 40, (1 + 6 + 3 + 5) + (8 + 6 + 10 + 1), 1),
        (POS2_END, 0, (2, 1), (False, True), 2 + 12 + 16 + 18 + 40, 19 + 33, 1),
        # The combine goes on beside the next attention, which the source's pair then computes in this span, too.
        (POS2_LATE, 0, (2, 1), (False, True), 2 + 12 + 32 + 18 + 40, 24 + 43, 0),
        (POS2_LATE, 1, (2, 1), (False, True), 2 + 12 + 16 + 18 + 40, 19 + 33, 1),  # no layer follows the last one
        # A source with a shared expert has something to run beside its exchange already.
        (POS1_END, 0, (1, 1), (True, True), 16 + 14 + 20, 40, 1),
        # Nothing but the attention to run beside: it hides one of a pass's two transfers.
        (POS1_END, 0, (1, 1), (False, False), 2 + 16 + 9 + 20, 2 + 16 + 9 + 10, 10),
    ],
)
def test_times_of_a_layer(
    way: Way,
    layer: int,
    top_k: tuple[int, int],
    shared: tuple[bool, bool],
    before_ms: float,
    after_ms: float,
    exposed_ms: float,
) -> None:
    found = layer_time(times(*POS2), Shape([8, 8], 2, 1, top_k, shared), way, layer)
    assert isinstance(found, LayerTime)
    assert (found.before.total_ms, found.after.total_ms) == pytest.approx((before_ms, after_ms))
    assert found.after.exposed_ms == pytest.approx(exposed_ms)
    assert found.saved_ms == pytest.approx(before_ms - after_ms)


def test_operators_that_were_not_timed() -> None:
    assert layer_time(times("shared"), Shape([8], 1, 1, (2, 1), (False, True)), Way("pos1", "end"), 0) == (
        "not timed: attention"
    )
    # Families of transformers call their attention by other names.
    made = entry("attention", "shared")
    made["times"]["backbone"][0]["name"] = "self_attn"
    of_family = Times({}, [(made["description"], OperatorTimes.model_validate(made["times"]))])
    found = layer_time(of_family, Shape([8], 1, 1, (1, 1), (True, True)), Way("pos1", "end"), 0)
    assert isinstance(found, LayerTime) and found.after.total_ms == pytest.approx(40)


def costs(increases: Sequence[float], saved: Sequence[float], hidden: float = 0.9) -> list[Cost]:
    """Every layer has 10 ms of communication. None of it is hidden in the source."""
    return [
        Cost(
            number,
            0.9,
            3 + increase,
            increase,
            LayerTime(Simulated(100, 10, 10, 0), Simulated(100 - ms, 10 - 10 * hidden, 10, 0)),
        )
        for number, (increase, ms) in enumerate(zip(increases, saved, strict=True))
    ]


class Sets:
    """Measured losses of all sets of five layers: the sums, and for each pair of neighbours a bit more."""

    def __init__(self, seed: int, equal: bool) -> None:
        chance = random.Random(seed)
        self.single = [chance.uniform(-0.01, 0.1) for _ in range(5)]
        self.more = chance.uniform(0.0, 0.02)
        saved = [10.0 if equal else chance.uniform(-2, 20) for _ in range(5)]
        self.costs, self.calls = costs(self.single, saved), 0
        self.all = [set_ for size in range(6) for set_ in itertools.combinations(range(5), size)]

    def loss(self, layers: Sequence[int]) -> float:
        self.calls += 1
        neighbours = sum(later - earlier == 1 for earlier, later in itertools.pairwise(sorted(layers)))
        return 3 + sum(self.single[each] for each in layers) + self.more * neighbours

    def saved(self, layers: Sequence[int]) -> float:
        return sum(self.costs[each].time.saved_ms for each in layers)  # type: ignore[union-attr]

    def chosen(self, budget: Budget) -> Choice:
        return Chooser(POS1_END, self.costs, 3.0, self.loss).choose(budget)


@pytest.mark.parametrize("seed", range(40))
def test_choice_of_loss_against_all_sets(seed: int) -> None:
    sets = Sets(seed, equal=True)
    limit = 3.0 * 1.03
    most = max(len(each) for each in sets.all if sets.loss(each) <= limit)
    sets.calls = 0
    found = sets.chosen(Budget(max_increase=0.03))
    assert found.fits == (most > 0)
    assert sets.calls <= 12  # of 32 sets
    if most:
        assert found.loss == pytest.approx(sets.loss(found.layers)) and found.loss <= limit
        assert found.summed == pytest.approx(3 + sum(sets.single[each] for each in found.layers))
        assert len(found.layers) >= most - 1  # greedy: neighbours that cost more can cost a layer
        others = set(range(5)) - set(found.layers)
        assert all(sets.loss([*found.layers, each]) > limit for each in others)


def test_choice_is_the_best_set_where_losses_add_up() -> None:
    for seed in range(40):
        sets = Sets(seed, equal=True)
        sets.more = 0.0
        fitting = [each for each in sets.all if sets.loss(each) <= 3.0 * 1.03]
        found = sets.chosen(Budget(max_increase=0.03))
        assert (len(found.layers) if found.fits else 0) == max(map(len, fitting))


def test_choice_of_unequal_times() -> None:
    for seed in range(40):
        sets = Sets(seed, equal=False)
        found = sets.chosen(Budget(max_increase=0.03))
        if found.fits:
            assert all(sets.saved([each]) > 0 for each in found.layers)
            assert found.saved_ms == pytest.approx(sets.saved(found.layers))
            others = [each for each in range(5) if each not in found.layers and sets.saved([each]) > 0]
            assert all(sets.loss([*found.layers, each]) > 3.0 * 1.03 for each in others)


@pytest.mark.parametrize(("least", "layers"), [(0.0, ()), (0.3, (1, 3)), (0.9, (1, 3, 0, 4, 2))])
def test_choice_of_hidden_share(least: float, layers: tuple[int, ...]) -> None:
    """Each layer hides 18 % of the communication of all five."""
    sets = Sets(0, equal=True)
    sets.single = [0.03, 0.01, 0.05, 0.02, 0.04]
    sets.costs = costs(sets.single, [10] * 5)
    found = sets.chosen(Budget(min_hidden=least))
    assert (found.layers, found.fits) == (layers, True)
    assert found.hidden == pytest.approx(0.18 * len(layers))
    assert not sets.chosen(Budget(min_hidden=0.95)).fits
    both = sets.chosen(Budget(max_increase=0.04, min_hidden=0.3))  # two would hide enough, a third one fits
    assert both.fits and len(both.layers) == (4 if sets.loss([1, 3, 0, 4]) <= 3.12 else 3)
    assert not sets.chosen(Budget(max_increase=0.005, min_hidden=0.3)).fits


def test_without_times_layers_count() -> None:
    plain = [Cost(number, 0.9, 3 + each, each, None) for number, each in enumerate((0.03, 0.01, 0.02))]
    chooser = Chooser(POS1_END, plain, 3.0, lambda layers: 3 + sum(plain[each].increase for each in layers))
    found = chooser.choose(Budget(max_increase=0.011))
    assert (found.layers, found.saved_ms, found.hidden) == ((1, 2), None, None)
    nearest = chooser.choose(Budget(max_increase=0.001))
    assert (nearest.layers, nearest.fits) == ((1,), False)


def test_best_of_several_ways() -> None:
    def choice(saved: float, loss: float, hidden: float, fits: bool = True) -> Choice:
        return Choice(POS1_END, (0,), 3.0, loss, saved, hidden, fits)

    slow, fast, no = choice(1, 3.01, 0.9), choice(2, 3.02, 0.8), choice(9, 3.5, 0.7, fits=False)
    assert best([slow, fast, no], Budget(max_increase=0.01)) is fast
    assert best([slow, fast, no], Budget(min_hidden=0.8)) is slow
    near = choice(1, 3.4, 0.79, fits=False)
    assert best([no, near], Budget(min_hidden=0.8)) is near


def test_front() -> None:
    assert front([(0, 3.0), (1, 2.9), (2, 3.2), (2, 3.1), (1.5, 3.3)]) == [1, 3]


def test_hidden_share_of_layers() -> None:
    assert hidden_share([Simulated(1, 1, 4, 0), Simulated(1, 0, 4, 0)]) == 1 - 1 / 8
    assert hidden_share([Simulated(1, 0, 0, 0)]) == 1
