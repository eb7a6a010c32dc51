"""Rows that go to copies of hot experts on a GPU: the bits of a CPU, no race, and no further wait of the host where the
row counts follow from what the ranks have told each other."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from lab.gpu_budgets import HOST_WAITS_FORWARD
from scmoe_ds import ScMoE
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.decisions.copied import CopiedExperts
from scmoe_ds.moe.decisions.copies import Copy, Costs
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
HIDDEN, EXPERTS = 16, 4
COPIES = [Copy(2, 0), Copy(0, 1)]


def layer_with_copies(k: int) -> Any:
    """Expert 0 is hot. Copies are filled by hand: every expert is a copy of one with other numbers."""
    torch.manual_seed(0)
    expert = MLP(GPTSettings(2, HIDDEN, 2, 64, 8, ffn_hidden_size=32))
    ranks = dist.get_world_size()
    layer = ScMoE(HIDDEN, expert, EXPERTS, ranks, k, drop_tokens=False, merge="add", top2_2nd_expert_sampling=False)
    layer.set_deepspeed_parallelism()
    layer.eval().requires_grad_(False)
    layer.deepspeed_moe.gate.wg.weight[0] *= 4
    members = layer.deepspeed_moe.experts.deepspeed_experts
    members.append(copy.deepcopy(members[0]))
    layer.early_rule = rule = CopiedExperts(1, Costs(0.0, 1.0, 1.0), ranks, lambda loads_E: COPIES)
    rule.copies = COPIES
    return layer


def forward(layer: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = layer(tokens)[0]
        return output


def passes() -> list[tuple[bool, list[str], dict[str, int], int, int]]:
    found = []
    for k in (1, 2):
        layer = layer_with_copies(k)
        tokens = torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
        expected = forward(layer, tokens)
        with simulated_gpu() as gpu:
            gpu.move(layer)
            moved = gpu.move(tokens)
            gpu.reset()
            output = forward(layer, moved)
            waits = dict(gpu.host_waits)
            same = torch.equal(gpu.peek(output), expected)
            found.append((same, list(gpu.findings), waits, k, layer.early_rule.loads.moved))
    return found


def test_copies() -> None:
    for found in run_distributed(passes, 2):
        for same, findings, waits, k, moved in found:
            assert same and findings == [] and moved > 0
            assert sum(waits.values()) == HOST_WAITS_FORWARD + (k > 1), waits
