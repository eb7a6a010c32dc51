"""Dropped rows on a device: the CPU's bits, nothing that a real device could do wrong, and no wait of the host more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lab.distributed import run_distributed
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.decisions.dropping import DropRule, Places, Thresholds
from scmoe_ds.moe.decisions.halves import HalvedExperts
from scmoe_ds.moe.decisions.load_aware import Levels, LoadAwareRule
from tests.simulated_gpu.cases import Case, build
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
CASES = [
    Case("scmoe", "pos2", 1, 1, trained=False),
    Case("scmoe", "pos2", 2, 1, top_k=2, trained=False),
    Case("pipelined_topk", "pos2", 1, 1, top_k=2, trained=False, swiglu=True, drop_tokens=False, dtype=torch.bfloat16),
]
LEVELS = Levels([Thresholds(0, 0), Thresholds(0.2, 0.4), Thresholds(0.3, 0.5)], 0.3)
Rule = Callable[[StagedPair, torch.device], Any]


def nothing(pair: StagedPair, device: torch.device) -> None:
    """Plain."""


def one_threshold(pair: StagedPair, device: torch.device) -> DropRule:
    pair.layer.routing_rule = rule = DropRule(Thresholds(0.4, 0.4), Places(2, 1), device)
    return rule


def halves(pair: StagedPair, device: torch.device) -> DropRule:
    pair.layer.deepspeed_moe.experts = HalvedExperts(pair.layer.deepspeed_moe.experts)
    pair.layer.routing_rule = rule = DropRule(Thresholds(0.3, 0.5), Places(2, 2), device)
    return rule


def load_aware(pair: StagedPair, device: torch.device) -> LoadAwareRule:
    pair.layer.deepspeed_moe.experts = HalvedExperts(pair.layer.deepspeed_moe.experts)
    pair.layer.early_rule = rule = LoadAwareRule(LEVELS, Places(2, 2), device)
    return rule


def run(case: Case, attach: Rule) -> tuple[bool, list[str], int, tuple[Any, Any]]:
    """Whether the bits are the CPU's, findings, waits of the host, and what both have counted."""
    pair, hidden = build(case), torch.randn(2, 12, 16, dtype=case.dtype, generator=torch.Generator().manual_seed(3))
    on_cpu = attach(pair, torch.device("cpu"))
    with torch.no_grad():
        expected = pair(hidden).hidden
    pair = build(case)
    with simulated_gpu(case.capability) as gpu:
        gpu.move(pair)
        on_gpu, moved = attach(pair, torch.device("cuda", 0)), gpu.move(hidden)
        gpu.reset()
        with torch.no_grad():
            output = pair(moved).hidden
        same, waits = torch.equal(gpu.peek(output), expected), sum(gpu.host_waits.values())
        counts = (None, None) if on_gpu is None else (on_cpu.counts.read(), on_gpu.counts.read())
        return same, list(gpu.findings), waits, counts


def outcomes() -> list[list[Any]]:
    return [[run(case, attach) for attach in (nothing, one_threshold, halves, load_aware)] for case in CASES]


def test_dropped_rows_cost_no_wait_of_the_host() -> None:
    for of_rank in run_distributed(outcomes, 2):
        for case, (plain, *others) in zip(CASES, of_rank, strict=True):
            assert plain[0] and not plain[1] and plain[2] > 0
            for same, findings, waits, (on_cpu, on_gpu) in others:
                assert same and not findings, (case, findings)
                assert waits == plain[2], case
                assert on_cpu == on_gpu and 0 < on_cpu[1] < on_cpu[0]
