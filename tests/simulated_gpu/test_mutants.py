"""Faults that are put into the communication are noticed; without them nothing is."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lab import gpu_budgets
from lab.distributed import run_distributed
from tests.simulated_gpu.cases import BACKBONES, Case, Outcome, run
from tests.simulated_gpu.device import NEEDS_SIMULATION
from tests.simulated_gpu.mutants import MUTANTS, SERIAL, VALUES, WAITS
from tests.simulated_gpu.mutation import mutated

pytestmark = NEEDS_SIMULATION
SLOTS = [
    Case("scmoe", position, slot, 1)
    for (architecture, position), operators in BACKBONES.items()
    if architecture == "scmoe"
    for slot in range(1, operators + 2)
]


def run_all() -> tuple[dict[str, Outcome], dict[Case, Outcome]]:
    """With each fault, and without any."""
    unchanged = {case: run(case) for case in (*(each.case for each in MUTANTS.values()), *SLOTS)}
    faulty = {name: with_fault(name) for name in MUTANTS}
    # On a loaded machine gloo's thread may hold a buffer that nobody else does, or be done before anybody looks.
    for _ in range(3):
        for name in missed_by_a_rank(faulty, unchanged):
            again = with_fault(name)
            if is_noticed(name, again, unchanged):
                faulty[name] = again
    return faulty, unchanged


def with_fault(name: str) -> Outcome:
    fault = MUTANTS[name]
    return run(fault.case, mutated(f"scmoe_ds.{fault.module}", fault.old, fault.new))


def is_noticed(name: str, outcome: Outcome, unchanged: dict[Case, Outcome]) -> bool:
    return MUTANTS[name].shows in shown_by(outcome, unchanged[MUTANTS[name].case])


def missed_by_a_rank(faulty: dict[str, Outcome], unchanged: dict[Case, Outcome]) -> list[str]:
    """In the order in which all ranks run them again."""
    mine = [name for name, outcome in faulty.items() if not is_noticed(name, outcome, unchanged)]
    missed: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(missed, mine)
    return sorted(set().union(*missed))


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[dict[str, Outcome], dict[Case, Outcome]]]:
    """Of both ranks."""
    return run_distributed(run_all, 2)


def shown_by(outcome: Outcome, unchanged: Outcome) -> set[str]:
    """What is wrong with it; `unchanged` has the same settings."""
    forward, backward = (sum(waits.values()) for waits in outcome.waits)
    waits = forward > gpu_budgets.HOST_WAITS_FORWARD or backward > gpu_budgets.HOST_WAITS_BACKWARD
    kinds = {finding.split(":")[0] for finding in outcome.findings}
    serial = any(now < before for now, before in zip(outcome.hidden, unchanged.hidden, strict=True))
    more = {VALUES: bool(outcome.differences), WAITS: waits, SERIAL: serial}
    return kinds | {kind for kind, shown in more.items() if shown}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed(name: str, outcomes: list[tuple[dict[str, Outcome], dict[Case, Outcome]]]) -> None:
    for faulty, unchanged in outcomes:
        assert is_noticed(name, faulty[name], unchanged), faulty[name]


def test_without_a_fault_nothing_is_noticed(outcomes: list[tuple[dict[str, Outcome], dict[Case, Outcome]]]) -> None:
    for _, unchanged in outcomes:
        assert [each for each in unchanged.values() if shown_by(each, each)] == []


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_rows_travel_beside_all_operators_behind_the_tap(
    position: str, outcomes: list[tuple[dict[str, Outcome], dict[Case, Outcome]]]
) -> None:
    """Before the experts' slot the dispatch does, behind it the combine: whatever the slot is, the same launches."""
    for _, unchanged in outcomes:
        hidden = {unchanged[each].hidden for each in SLOTS if each.position == position}
        assert len(hidden) == 1 and all(min(each) > 0 for each in hidden), hidden


def test_what_no_longer_stands_there_is_an_error() -> None:
    for old in ("no such text", "from functools import partial"):
        with pytest.raises(LookupError, match="write the mutant anew"), mutated("scmoe_ds.comm.counts", old, "pass"):
            pass
