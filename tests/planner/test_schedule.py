"""Schedules as data, and the slot that halves the backbone."""

from __future__ import annotations

import itertools

import pytest
import torch

from scmoe_ds import Schedule
from scmoe_ds.overlap import executor
from scmoe_ds.overlap.executor import Activations, Operator, PairOutput, numbered
from scmoe_ds.planner.plan import slot_that_halves


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_slot_halves_as_well_as_any(count: int) -> None:
    for costs in itertools.islice(itertools.product([1, 2, 5, 9], repeat=count), 300):
        slot = slot_that_halves(costs)
        imbalances = {s: abs(sum(costs[: s - 1]) - sum(costs[s - 1 :])) for s in range(1, count + 2)}
        assert imbalances[slot] == min(imbalances.values())
        assert slot == min(s for s in imbalances if imbalances[s] == imbalances[slot]), "the earlier one wins a tie"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_slot": 0}, "expert_slot counts from 1"),
        ({"expert_slot": (0, 1), "num_chunks": 2}, "expert_slot counts from 1"),
        ({"expert_slot": 1, "num_chunks": 0}, "num_chunks counts from 1"),
        ({"expert_slot": (), "num_chunks": 0}, "num_chunks counts from 1"),
        ({"expert_slot": (1, 2)}, "expert_slot has 2 slots for 1 chunks"),
        ({"expert_slot": (1, 2), "num_chunks": 3}, "expert_slot has 2 slots for 3 chunks"),
        ({"expert_slot": (2, 1), "num_chunks": 2}, "expert_slot decreases"),
    ],
)
def test_impossible_schedules(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_slots_of_chunks() -> None:
    assert Schedule(2).slots == (2,)
    assert Schedule(2, 3).slots == (2, 2, 2)
    schedule = Schedule((1, 3, 3), 3)
    assert schedule.slots == (1, 3, 3)


def test_a_list_of_slots_becomes_a_tuple() -> None:
    schedule = Schedule([1, 2], 2)  # type: ignore[arg-type]
    assert schedule == Schedule((1, 2), 2)
    assert {schedule: "usable as a key"}[Schedule((1, 2), 2)]


class _Pair:
    """Records what the executor calls, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def operators(self) -> list[Operator]:
        def step(name: str, activations: Activations) -> Activations:
            self.events.append(name)
            return activations

        names = ("first attention", "mlp", "attention", "shared")
        return numbered([(name, lambda activations, name=name: step(name, activations)) for name in names], tap=1)

    def begin(self, activations: Activations, used_token: object, schedule: Schedule, recorder: object) -> _Pair:
        self.events.append(f"begin {schedule.num_chunks}{'' if schedule.overlap else ' blocking'}")
        return self

    def send(self) -> None:
        pass

    def run_experts(self) -> None:
        self.events.append("experts")

    def join(self, routed: object, activations: Activations) -> PairOutput:
        self.events.append("join")
        return PairOutput(activations.hidden, torch.zeros(()), torch.zeros(1))


@pytest.mark.parametrize("slot", [1, 2, 3, 4])
def test_experts_run_before_the_operator_that_the_slot_names(slot: int) -> None:
    pair = _Pair()
    executor.run(pair, torch.zeros(1), Schedule(slot, overlap=slot != 1))
    operators = ["mlp", "attention", "shared"]
    operators.insert(slot - 1, "experts")
    assert pair.events == ["first attention", "begin 1" if slot != 1 else "begin 1 blocking", *operators, "join"]


@pytest.mark.parametrize(
    ("slots", "operators"),
    [
        ((1, 4), "experts mlp attention shared experts"),
        ((2, 3), "mlp experts attention experts shared"),
        ((2, 2, 4), "mlp experts experts attention shared experts"),
        (3, "mlp attention experts experts shared"),
    ],
)
def test_every_chunk_has_its_slot(slots: tuple[int, ...] | int, operators: str) -> None:
    pair, chunks = _Pair(), len(slots) if isinstance(slots, tuple) else 2
    executor.run(pair, torch.zeros(1), Schedule(slots, chunks))
    assert pair.events == ["first attention", f"begin {chunks}", *operators.split(), "join"]


def test_slot_beyond_the_backbone() -> None:
    with pytest.raises(ValueError, match="the backbone has 3 operators"):
        executor.run(_Pair(), torch.zeros(1), Schedule(5))


def test_operators_can_be_told_apart() -> None:
    kinds = ("attention", "mlp", "attention", "mlp", "attention", "mlp")
    operators = numbered([(kind, lambda activations: activations) for kind in kinds], tap=3)
    labels = ["attention before tap", "mlp before tap", "attention before tap 2", "mlp", "attention", "mlp 2"]
    assert [operator.label for operator in operators] == labels
    again = numbered([(kind, torch.nn.Identity()) for kind in kinds], tap=3)
    assert again == operators and len(set(operators)) == 6, "what an operator runs is not its identity"
