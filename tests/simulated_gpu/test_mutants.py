"""Faults that are put into the communication are noticed; without them nothing is."""

from __future__ import annotations

import pytest

from lab import gpu_budgets
from lab.distributed import run_distributed
from tests.simulated_gpu.cases import Outcome, run
from tests.simulated_gpu.device import NEEDS_SIMULATION
from tests.simulated_gpu.mutants import MUTANTS, VALUES, WAITS
from tests.simulated_gpu.mutation import mutated

pytestmark = NEEDS_SIMULATION


def run_all() -> tuple[dict[str, Outcome], list[Outcome]]:
    """With each fault, and once for each of their settings without any."""
    faulty = {
        name: run(each.case, mutated(f"scmoe_ds.{each.module}", each.old, each.new)) for name, each in MUTANTS.items()
    }
    return faulty, [run(case) for case in dict.fromkeys(each.case for each in MUTANTS.values())]


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[dict[str, Outcome], list[Outcome]]]:
    """Of both ranks."""
    return run_distributed(run_all, 2)


def shown_by(outcome: Outcome) -> set[str]:
    """What is wrong with it."""
    forward, backward = (sum(waits.values()) for waits in outcome.waits)
    waits = forward > gpu_budgets.HOST_WAITS_FORWARD or backward > gpu_budgets.HOST_WAITS_BACKWARD
    kinds = {finding.split(":")[0] for finding in outcome.findings}
    if outcome.differences:
        kinds.add(VALUES)
    return kinds | {WAITS} if waits else kinds


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed(name: str, outcomes: list[tuple[dict[str, Outcome], list[Outcome]]]) -> None:
    for faulty, _ in outcomes:
        assert MUTANTS[name].shows in shown_by(faulty[name]), faulty[name]


def test_without_a_fault_nothing_is_noticed(outcomes: list[tuple[dict[str, Outcome], list[Outcome]]]) -> None:
    for _, unchanged in outcomes:
        assert [each for each in unchanged if shown_by(each)] == []


def test_what_no_longer_stands_there_is_an_error() -> None:
    for old in ("no such text", "from functools import partial"):
        with pytest.raises(LookupError, match="write the mutant anew"), mutated("scmoe_ds.comm.counts", old, "pass"):
            pass
