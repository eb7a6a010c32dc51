"""Identity experts, against loops over tokens: output, gradients, counts, and the rows that travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scmoe_ds.moe.layer import StagedMoE
from tests.helpers.reference import choose

HIDDEN, TOKENS, EXPERTS, IDENTITY = 8, 24, 4, 3


def make_layer(k: int, **settings: Any) -> StagedMoE:
    """The gate has more outputs than there are experts."""
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 12), nn.GELU(), nn.Linear(12, HIDDEN))
    common = dict(use_rts=False, top2_2nd_expert_sampling=False, min_capacity=1)
    layer = StagedMoE(HIDDEN, expert, EXPERTS, k=k, **{**common, **settings})
    layer.deepspeed_moe.gate.wg = nn.Linear(HIDDEN, EXPERTS + IDENTITY, bias=False)
    return layer


def by_loops(layer: StagedMoE, x_TD: Tensor, **gate: Any) -> tuple[Tensor, list[int]]:
    """Output, and rows of each real expert."""
    choices, _ = choose(x_TD @ layer.deepspeed_moe.gate.wg.weight.t(), **gate)
    rows = [0] * EXPERTS
    outputs = []
    for x_D, chosen in zip(x_TD, choices, strict=True):
        total_D = torch.zeros_like(x_D)
        for expert, weight in chosen:
            if expert < EXPERTS:
                rows[expert] += 1
            result_D = layer.deepspeed_moe.experts.deepspeed_experts[expert](x_D) if expert < EXPERTS else x_D
            total_D = total_D + weight * result_D
        outputs.append(total_D)
    return torch.stack(outputs), rows


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("k", "drop"), [(1, False), (2, False), (2, True), (3, False), (3, True)])
def test_they_return_the_token_itself(k: int, dispatch: str, chunks: int, drop: bool) -> None:
    layer = make_layer(k, dispatch=dispatch, drop_tokens=drop, capacity_factor=0.7)
    x_TD = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    used = torch.arange(TOKENS) % 5 != 3
    gate = dict(k=k, capacity_factor=0.7, min_capacity=1, drop=drop, used=used.tolist())
    target_TD, rows = by_loops(layer, x_TD, **gate)
    routed = layer.begin(x_TD, used, num_chunks=chunks)
    for _ in range(chunks):
        routed.run_experts()
    output_TD, _, counts = layer.finish(routed, x_TD)
    assert sum(rows) < len([t for t in used if t]) * k, "no token has chosen an identity expert"
    assert routed.routing.choices.rows_E.tolist() == rows
    assert len(counts) == EXPERTS + IDENTITY and counts.sum() == used.sum() * k
    torch.testing.assert_close(output_TD, target_TD, rtol=1e-5, atol=1e-6)
    inputs = [x_TD, layer.deepspeed_moe.gate.wg.weight, *layer.deepspeed_moe.experts.parameters()]
    grad_TD = torch.randn(TOKENS, HIDDEN)
    found, expected = (
        torch.autograd.grad(each, inputs, grad_TD, materialize_grads=True) for each in (output_TD, target_TD)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_tokens_that_choose_identity_experts_alone_send_nothing() -> None:
    layer = make_layer(2, drop_tokens=False)
    layer.deepspeed_moe.gate.wg.weight.data[:EXPERTS].fill_(-10.0)
    x_TD = torch.rand(TOKENS, HIDDEN) + 0.1
    routed = layer.begin(x_TD)
    assert routed.routing.choices.rows_E.sum() == 0
    routed.run_experts()
    output_TD, _, _ = layer.finish(routed, x_TD)
    torch.testing.assert_close(output_TD, x_TD, rtol=1e-5, atol=1e-6)  # renormalised: both weights add up to 1


def test_bf16_is_rounded_once() -> None:
    layer = make_layer(2, gate_softmax="all", drop_tokens=False).bfloat16()
    layer.deepspeed_moe.gate.wg.weight.data[:EXPERTS] *= 0.1
    x_TD = torch.randn(TOKENS, HIDDEN).bfloat16()
    routed = layer.begin(x_TD)
    routed.run_experts()
    output_TD, _, _ = layer.finish(routed, x_TD)
    alone_T = routed.routing.weight_KT.sum(0) == 0  # no real expert has a part in these tokens
    assert alone_T.any()
    target_TD = (x_TD.double() * routed.routing.identity_weight_T.double().unsqueeze(1)).bfloat16()
    assert torch.equal(output_TD[alone_T], target_TD[alone_T])
