"""Experts in parts on a device: the CPU's bits, nothing that a real device could do wrong, and no wait more."""

from __future__ import annotations

import torch

from lab.distributed import run_distributed
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.moe.decisions.partition import divide_experts
from tests.simulated_gpu.cases import Case, build
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
CASES = [
    Case("scmoe", "pos2", 2, 1, trained=False),
    Case("pipelined_topk", "pos2", 1, 1, top_k=2, trained=False, swiglu=True, drop_tokens=False, dtype=torch.bfloat16),
]


def made(case: Case, in_parts: bool) -> StagedPair:
    pair = build(case)
    if in_parts:
        divide_experts(pair.layer, 2)
        weight = pair.layer.deepspeed_moe.gate.wg.weight
        weight.data.normal_(generator=torch.Generator().manual_seed(4))
    return pair


def run(case: Case, in_parts: bool) -> tuple[bool, list[str], int]:
    """Whether the bits are the CPU's, findings, and waits of the host."""
    hidden = torch.randn(2, 12, 16, dtype=case.dtype, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = made(case, in_parts)(hidden).hidden
    pair = made(case, in_parts)
    with simulated_gpu(case.capability) as gpu:
        gpu.move(pair)
        moved = gpu.move(hidden)
        gpu.reset()
        with torch.no_grad():
            output = pair(moved).hidden
        same, waits = torch.equal(gpu.peek(output), expected), sum(gpu.host_waits.values())
        return same, list(gpu.findings), waits


def run_all() -> list[list[tuple[bool, list[str], int]]]:
    return [[run(case, in_parts) for in_parts in (False, True)] for case in CASES]


def test_parts_cost_no_wait_of_the_host() -> None:
    for found in run_distributed(run_all, 2):
        for case, (whole, parts) in zip(CASES, found, strict=True):
            assert whole[2] > 0
            assert parts == (True, [], whole[2]), case
