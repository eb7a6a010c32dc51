"""Every three settings of a pair together, forward and backward, on a simulated device: the CPU's bits and no finding.

And what a pair costs the host: waits and launches, against lab/gpu_budgets.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from lab import gpu_budgets
from lab.distributed import run_distributed
from tests.simulated_gpu.cases import PLACES, SETTINGS, Case, Outcome, covering, run_all
from tests.simulated_gpu.device import NEEDS_SIMULATION

pytestmark = NEEDS_SIMULATION
COUNTED = Case("scmoe", "pos2", 2, 1, dtype=torch.bfloat16, capability=(9, 0), dropout=0.0, fused_gate=True)
PLAIN = replace(COUNTED, fused_gate=False)
SEVERAL = replace(PLAIN, top_k=2)
BUDGETS = {
    COUNTED: (
        gpu_budgets.LAUNCHES_FORWARD,
        gpu_budgets.LAUNCHES_BACKWARD,
        gpu_budgets.GATE_LAUNCHES_FORWARD,
    ),
    PLAIN: (
        gpu_budgets.PLAIN_LAUNCHES_FORWARD,
        gpu_budgets.PLAIN_LAUNCHES_BACKWARD,
        gpu_budgets.PLAIN_GATE_LAUNCHES_FORWARD,
    ),
    SEVERAL: (
        gpu_budgets.SEVERAL_LAUNCHES_FORWARD,
        gpu_budgets.SEVERAL_LAUNCHES_BACKWARD,
        gpu_budgets.SEVERAL_GATE_LAUNCHES_FORWARD,
    ),
}
MODELS = [
    Case("scmoe", "pos2", 2, 2, spread=True, dtype=torch.bfloat16),
    Case("dgmoe", "pos2", 3, 1, recompute="full"),
    Case("overlapped_shared_expert", "pos2", 2, 1, dispatch="padded", top_k=2),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["data parallel", "tensor parallel"])
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    """Of both ranks."""
    size = request.param
    cases = [case for case in (*BUDGETS, *covering()) if case.tensor_parallel == size]
    models = [Case(**{**vars(case), "tensor_parallel": size}) for case in MODELS]
    return list(itertools.chain(*run_distributed(run_all, 2, cases, models, size)))


def test_the_same_bits_and_no_finding(outcomes: list[Outcome]) -> None:
    wrong = [each for each in outcomes if each.differences or each.findings]
    assert not wrong, "\n".join(f"{each.case}\n  {each.differences} {each.findings}" for each in wrong)


def test_waits_of_the_host(outcomes: list[Outcome]) -> None:
    """DGMoE begins twice, and what is computed again waits again."""
    for outcome in outcomes:
        case, whole = outcome.case, outcome.moe_layers > 1
        forward, backward = (sum(waits.values()) for waits in outcome.waits)
        begins = outcome.moe_layers * (2 if case.architecture == "dgmoe" else 1)
        allowed = begins * gpu_budgets.HOST_WAITS_FORWARD
        again = allowed if case.recompute == "full" else 0
        assert forward <= allowed + (again if whole else 0), outcome.waits
        assert backward <= begins * gpu_budgets.HOST_WAITS_BACKWARD + again, outcome.waits


def test_launches(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.case in BUDGETS:
            launches = list(outcome.launches.items())
            forward = sum(count for launch, count in launches if launch.phase == "forward")
            backward = sum(count for launch, count in launches if launch.phase == "backward")
            gate = sum(count for launch, count in launches if (launch.phase, launch.part) == ("forward", "gate"))
            budget = BUDGETS[outcome.case]
            assert 30 < forward <= budget[0] and 30 < backward <= budget[1] and 5 < gate <= budget[2]


def test_every_three_settings_meet() -> None:
    cases = covering()
    places = [(each["architecture"], each["position"], each["slot"], each["chunks"]) for each in PLACES]
    assert {(case.architecture, case.position, case.slot, case.chunks) for case in cases} == set(places)
    for names in itertools.combinations(SETTINGS, 3):
        met = {tuple(getattr(case, name) for name in names) for case in cases}
        assert met == set(itertools.product(*(SETTINGS[name] for name in names)))
