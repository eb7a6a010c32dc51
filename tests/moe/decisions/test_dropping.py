"""1T-Drop and 2T-Drop on one rank, against a reference that computes every pair of token and expert by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor

from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe import experts as experts_module
from scmoe_ds.moe.decisions.dropping import DropRule, Places, Thresholds, criterion
from scmoe_ds.moe.decisions.halves import HalvedExperts, HalvedGroups
from scmoe_ds.moe.decisions.load_aware import Levels, LoadAwareRule
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.decisions.partition import Partition
from scmoe_ds.moe.gate import Routing, route
from scmoe_ds.moe.kernels import Kernels, torch_product
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.shortcut import DGMoE
from tests.helpers import reference

HIDDEN, EXPERTS, TOKENS = 8, 4, 40
CPU = torch.device("cpu")


def layer_of(k: int, swiglu: bool, softmax: Any = "deepspeed") -> StagedMoE:
    torch.manual_seed(k)
    settings = GPTSettings(1, HIDDEN, 1, 8, 8, ffn_hidden_size=12, swiglu=swiglu)
    layer = StagedMoE(
        HIDDEN,
        MLP(settings),
        EXPERTS,
        k=k,
        drop_tokens=False,
        use_rts=False,
        gate_softmax=softmax,
        top2_2nd_expert_sampling=False,
    )
    torch.nn.init.normal_(layer.deepspeed_moe.gate.wg.weight)
    return layer.double().eval()


def drop_rows(layer: StagedMoE, thresholds: Thresholds) -> DropRule:
    """Gives a layer a rule, and halves where the thresholds differ."""
    halves = 1 if thresholds.skip == thresholds.halve else 2
    if halves == 2:
        layer.deepspeed_moe.experts = HalvedExperts(layer.deepspeed_moe.experts)
    layer.routing_rule = rule = DropRule(thresholds, Places(EXPERTS, halves), CPU)
    return rule


def forward(layer: StagedMoE, tokens_TD: Tensor, used_T: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        return layer(tokens_TD, used_T)[0].clone()


def middle(layer: StagedMoE, tokens_TD: Tensor) -> float:
    """A threshold between the criteria of two choices."""
    with torch.no_grad():
        routing = route(layer.deepspeed_moe.gate, tokens_TD, facts=True)
    ordered = criterion(routing).flatten().sort().values
    at = len(ordered) // 3
    return float((ordered[at] + ordered[at + 1]) / 2)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("k", "softmax"), [(1, "deepspeed"), (2, "deepspeed"), (2, "all"), (4, "deepspeed")])
def test_outputs_equal_the_reference(k: int, softmax: str, swiglu: bool) -> None:
    layer = layer_of(k, swiglu, softmax)
    weights = {name: each.detach().clone() for name, each in layer.named_parameters()}
    tokens_TD = torch.randn(TOKENS, HIDDEN).double()
    T = middle(layer, tokens_TD)
    logits = (tokens_TD.float() @ weights["deepspeed_moe.gate.wg.weight"].float().T).double()
    choices, _ = reference.choose(logits, k, 1.0, 1, False, softmax=softmax)
    for skip, halve in ((T, T), (T * 0.8, T * 1.2)):
        expected, rates = reference.dropped(tokens_TD, weights, "deepspeed_moe", choices, skip, halve, swiglu)
        rule = drop_rows(layer, Thresholds(skip, halve))
        torch.testing.assert_close(forward(layer, tokens_TD), expected, rtol=1e-6, atol=1e-6)
        assert rule.counts.read() == rates
        assert 0 < rates[1] < rates[0] and (rates[2] > 0) == (skip < halve)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_thresholds_of_zero_change_no_bit(k: int, swiglu: bool) -> None:
    layer, tokens_TD = layer_of(k, swiglu), torch.randn(TOKENS, HIDDEN).double()
    before = forward(layer, tokens_TD)
    rule = drop_rows(layer, Thresholds(0.0, 0.0))
    assert torch.equal(forward(layer, tokens_TD), before)
    layer.deepspeed_moe.experts = HalvedExperts(layer.deepspeed_moe.experts)
    layer.routing_rule = DropRule(Thresholds(0.0, 0.0), Places(EXPERTS, 2), CPU)
    assert torch.equal(forward(layer, tokens_TD), before)
    assert rule.counts.read() == (k * TOKENS, k * TOKENS, 0)


def test_a_token_of_padding_is_not_counted_and_training_drops_nothing() -> None:
    layer, tokens_TD = layer_of(2, False), torch.randn(TOKENS, HIDDEN).double()
    trained = layer.train()(tokens_TD)[0]
    rule = drop_rows(layer, Thresholds(2.0, 2.0))
    assert torch.equal(layer(tokens_TD)[0], trained)
    used_T = torch.arange(TOKENS) % 4 != 0
    assert not forward(layer.eval(), tokens_TD, used_T).any()
    assert rule.counts.read() == (2 * int(used_T.sum()), 0, 0)
    rule.counts.reset()
    assert rule.counts.read() == (0, 0, 0)


@pytest.mark.parametrize("thresholds", [Thresholds(2.0, 2.0), Thresholds(0.0, 2.0)], ids=["skipped", "halved"])
def test_the_second_gate_of_dgmoe_chooses_as_without_drops(thresholds: Thresholds) -> None:
    torch.manual_seed(1)
    layer: Any = DGMoE(HIDDEN, MLP(GPTSettings(1, HIDDEN, 1, 8, 8)), EXPERTS, drop_tokens=False, use_rts=False)
    layer = layer.double().eval()
    previous, current = torch.randn(2, TOKENS, HIDDEN).double()
    current[::2] = previous[::2]  # the same first choice, which the second gate may not take
    plain, _, counts_E = layer(current, shortcut=previous)
    drop_rows(layer, thresholds)
    output, _, found_E = layer(current, shortcut=previous)
    assert torch.equal(found_E, counts_E) and not torch.allclose(output, plain)


@pytest.mark.parametrize("k", [1, 2])
def test_the_parts_of_an_expert_matter_as_the_whole_one(k: int) -> None:
    layer, partition = layer_of(k, False), Partition(3, EXPERTS)
    routing = route(layer.deepspeed_moe.gate, torch.randn(TOKENS, HIDDEN).double(), facts=True)
    parted = partition.apply(routing)
    torch.testing.assert_close(criterion(parted), partition.repeat(criterion(routing)))
    tolerant_KT, settings = criterion(routing) < 0.5, LowPrecision(score=0.5)
    assert 0 < tolerant_KT.sum() < tolerant_KT.numel()
    for each, expected in ((routing, tolerant_KT), (parted, partition.repeat(tolerant_KT))):
        found = settings.tolerant(each)
        assert found is not None and torch.equal(found, expected)


def test_no_weight_is_copied_and_names_stay() -> None:
    layer = layer_of(1, True)
    before = {name: each.data_ptr() for name, each in layer.named_parameters()}
    layer.deepspeed_moe.experts = HalvedExperts(layer.deepspeed_moe.experts)
    assert {name: each.data_ptr() for name, each in layer.named_parameters()} == before


@pytest.mark.parametrize("loop", [True, False])
def test_autoeps_experts_have_halves_too(loop: bool) -> None:
    experts = GroupedExperts(HIDDEN, 16, 3, use_grouped_mm=not loop)
    for each in experts.parameters():
        torch.nn.init.normal_(each)
    rows_SD, counts = torch.randn(20, HIDDEN), [5, 0, 4, 0, 8, 3]
    with torch.inference_mode():
        output_SD = HalvedGroups(experts).run(rows_SD, counts)
        expected = []
        for place, part_SD in enumerate(rows_SD.split(counts)):
            width, expert = 16 if place < 3 else 8, place % 3
            gate, up = part_SD @ experts.w1[expert].T, part_SD @ experts.w3[expert].T
            inner = torch.nn.functional.silu(gate) * up
            expected.append(inner[:, :width] @ experts.w2[expert][:, :width].T)
    torch.testing.assert_close(output_SD, torch.cat(expected))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch 2.6 has no grouped_mm")
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_grouped_product_of_halves_is_that_of_each(swiglu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GPTSettings(1, 16, 1, 8, 8, ffn_hidden_size=32, swiglu=swiglu)
    experts = HalvedExperts(StagedMoE(16, MLP(settings), 3).bfloat16().deepspeed_moe.experts)
    rows_SD, counts = torch.randn(20, 16).bfloat16(), [0, 0, 0, 8, 0, 12]
    with torch.inference_mode():
        expected = experts.run(rows_SD, counts)
        used: list[Tensor] = []

        def product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
            used.append(weights)
            return torch_product(rows, weights, ends)

        monkeypatch.setattr(experts_module, "kernels_of", lambda rows: Kernels(grouped_product=product))
        torch.testing.assert_close(experts.run(rows_SD, counts), expected, rtol=0.05, atol=0.01)
    assert [each.shape for each in used] == [(3, 16 * (1 + swiglu), 16), (3, 16, 16)]


def test_experts_that_cannot_be_halved_are_refused() -> None:
    layer = layer_of(1, False)
    layer.deepspeed_moe.experts.deepspeed_experts[0] = torch.nn.Linear(HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"^an expert of Linear has no halves"):
        HalvedExperts(layer.deepspeed_moe.experts)
    odd = StagedMoE(HIDDEN, MLP(GPTSettings(1, HIDDEN, 1, 8, 8), width=7), EXPERTS)
    with pytest.raises(ValueError, match="7 neurons cannot be halved"):
        HalvedExperts(odd.deepspeed_moe.experts)
    with pytest.raises(ValueError, match="half of 12 neurons is not a multiple of 16 bytes"):
        HalvedGroups(GroupedExperts(HIDDEN, 12, 3))


def test_a_routing_without_scores_is_refused() -> None:
    layer = layer_of(2, False)
    routing: Routing = route(layer.deepspeed_moe.gate, torch.randn(TOKENS, HIDDEN).double())
    with pytest.raises(ValueError, match=r"score_KT = None"):
        criterion(routing)


def test_an_early_rule_takes_no_chunks() -> None:
    layer: Any = layer_of(2, False)
    layer.early_rule = LoadAwareRule(Levels([Thresholds(0.0, 0.0), Thresholds(0.2, 0.2)], 0.1), Places(EXPERTS, 1), CPU)
    with pytest.raises(
        ValueError, match=r"num_chunks = 2: load-aware thresholds .* set scmoe\.overlap\.num_chunks to 1"
    ):
        layer.begin(torch.randn(TOKENS, HIDDEN).double(), num_chunks=2)


def test_levels_follow_the_loads() -> None:
    """Each 0.1 of a threshold leaves 0.1 of a rank's rows out; 0.25 of all are wanted."""
    parts = [number / 10 for number in range(7)]
    levels = Levels([Thresholds(max(part - 0.01, 0.0), part) for part in parts], 0.25)

    def of_ranks(*loads: int) -> list[int]:
        left_out = [[round(2 * load * part) for part in parts] for load in loads]
        return levels.of_ranks(torch.tensor(loads), torch.tensor(left_out)).tolist()

    assert of_ranks(100, 100) == [3, 2]  # 0.25 of all, which no level is of both
    assert of_ranks(100, 300) == [1, 3]  # r = 0.5 and 1.5: 0.25 · 0.1 + 0.75 · 0.3 = 0.25 of all
    assert of_ranks(300, 100, 320) == [2, 1, 3]  # 166 of 720; 196 if the first rank had its next level, too
    assert of_ranks(0, 0) == [0, 0]
    # A rank whose tokens are sure of their experts leaves nothing out: the other one leaves out more.
    sure = torch.tensor([[0] * 7, [0, 20, 40, 60, 80, 100, 120]])
    assert levels.of_ranks(torch.tensor([100, 100]), sure).tolist() == [5, 5]
    with pytest.raises(ValueError, match="must not fall"):
        Levels([Thresholds(0.2, 0.2), Thresholds(0.1, 0.3)], 0.25)
