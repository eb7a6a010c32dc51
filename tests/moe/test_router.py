"""Routers beside DeepSpeed's gate: transformers' choices and weights, loops over tokens, the bias and the z-loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

from scmoe_ds import RouterConfig, ScMoE
from scmoe_ds.moe.deepspeed_gate import admit_any_tokens
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.router import RouterGate, equip
from scmoe_ds.moe.shortcut import DGMoE
from scmoe_ds.moe.z_loss import follow

HIDDEN, EXPERTS, TOKENS = 16, 12, 200
GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}
DEEPSEEK_V3 = {"score_func": "sigmoid", "route_scale": 2.5, **GROUPS, "load_balance_coeff": 0.001}


def gate_of(router: dict[str, Any], k: int = 4, **settings: Any) -> RouterGate:
    torch.manual_seed(3)
    gate = TopKGate(HIDDEN, EXPERTS, k, **{"drop_tokens": False, "top2_2nd_expert_sampling": False, **settings})
    equip(gate, RouterConfig(**router))
    assert isinstance(gate, RouterGate)
    gate.wg.weight.data.normal_(0, 0.5)
    if gate.router.has_bias:
        gate.e_score_correction_bias.normal_(0, 0.1)
    return gate


def dense(routing: Any) -> Tensor:
    """[T, E] weights, -1 where an expert is not chosen."""
    expert_KT, weight_KT = routing.expert_KT, routing.weight_KT
    found = torch.full((expert_KT.shape[1], EXPERTS + 1), -1.0)
    return found.scatter(1, expert_KT.t() % (EXPERTS + 1), weight_KT.t())[:, :EXPERTS]


SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_experts_per_tok": 4,
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS - 4,
    "zero_expert_num": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "topk_method": "group_limited_greedy",
}
SOFTMAX = {"score_func": "softmax", "route_norm": False, "route_scale": 2.5}
THEIRS: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-V3": (DeepseekV3TopkRouter, {"norm_topk_prob": True}, DEEPSEEK_V3),
    "DeepSeek-V3 without norm": (DeepseekV3TopkRouter, {"norm_topk_prob": False}, {**DEEPSEEK_V3, "route_norm": False}),
    "GLM-4": (Glm4MoeTopkRouter, {"norm_topk_prob": True, "n_routed_experts": EXPERTS}, DEEPSEEK_V3),
    "DeepSeek-V2": (DeepseekV2TopkRouter, {}, {**SOFTMAX, **GROUPS, "group_score_func": "max"}),
    "DeepSeek-V2-Lite": (DeepseekV2TopkRouter, {"topk_method": "greedy"}, SOFTMAX),
    "LongCat-Flash": (LongcatFlashTopkRouter, {}, {**SOFTMAX, "load_balance_coeff": 0.001}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_equals_transformers(name: str) -> None:
    kind, config, router = THEIRS[name]
    gate, theirs = gate_of(router), kind(SimpleNamespace(**{**SIZES, **config}))
    tokens = torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        getattr(theirs, "classifier", theirs).weight.copy_(gate.wg.weight)
        if gate.router.has_bias:
            theirs.e_score_correction_bias.copy_(gate.e_score_correction_bias)
        _, weight_TK, expert_TK = theirs(tokens)
        ours = route(gate, tokens)
    expected = torch.full((TOKENS, EXPERTS), -1.0).scatter(1, expert_TK, weight_TK)
    assert torch.equal(dense(ours) < 0, expected < 0)
    torch.testing.assert_close(dense(ours), expected, atol=1e-7, rtol=1e-7)
    assert ours.exp_counts.tolist() == expert_TK.flatten().bincount(minlength=EXPERTS).tolist()


def by_hand(
    gate: RouterGate, tokens: Tensor, used: list[bool], limit: int | None
) -> tuple[list[dict], list[int], float]:
    """Weights of each token's kept choices, tokens per expert before drops, and the balancing loss; loops."""
    router, bias = gate.router, getattr(gate, "e_score_correction_bias", torch.zeros(EXPERTS))
    choices: list[dict[int, float]] = []
    shares, counts = [0.0] * EXPERTS, [0] * EXPERTS
    for x, is_used in zip(tokens.double(), used, strict=True):
        choices.append({})
        if not is_used:
            continue
        logits = [float(x @ row) for row in gate.wg.weight.detach().double()]
        total = sum(torch.tensor(logits).exp().tolist())
        sigmoid = router.score_func == "sigmoid"
        scores = [1 / (1 + 2.718281828459045**-z) if sigmoid else 2.718281828459045**z / total for z in logits]
        by = [s + float(b) for s, b in zip(scores, bias, strict=True)]
        allowed = set(range(EXPERTS))
        if router.num_expert_groups is not None:
            size = EXPERTS // router.num_expert_groups
            groups = [range(g * size, (g + 1) * size) for g in range(router.num_expert_groups)]
            take = 1 if router.group_score_func == "max" else 2
            groups.sort(key=lambda group: -sum(sorted((by[e] for e in group), reverse=True)[:take]))
            allowed = {e for group in groups[: router.num_limited_groups] for e in group}
        best = sorted(allowed, key=lambda e: -by[e])[: gate.k]
        norm = sum(scores[e] for e in best) if router.normalises(gate.k) else 1.0
        choices[-1] = {e: router.route_scale * scores[e] / norm for e in best}
        for e in range(EXPERTS):
            shares[e] += scores[e] / sum(scores)
            counts[e] += e in best
    number = sum(used)
    loss = EXPERTS * sum(s / number * c / number / gate.k for s, c in zip(shares, counts, strict=True))
    if limit is not None:
        for e in range(EXPERTS):  # of an expert's tokens the best ones stay
            got = sorted((t for t, kept in enumerate(choices) if e in kept), key=lambda t: -choices[t][e])
            for t in got[limit:]:
                choices[t] = {**choices[t], e: 0.0}
    return choices, counts, loss


@pytest.mark.parametrize("router", [DEEPSEEK_V3, {**SOFTMAX, "load_balance_coeff": 0.0}, {**SOFTMAX, **GROUPS}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_equals_loops_over_tokens(router: dict, masked: bool, drop: bool) -> None:
    # Without a norm the weights have the order of the scores, by which a limit keeps.
    router = {**router, "route_norm": False} if drop else router
    gate = gate_of(router, drop_tokens=drop, capacity_factor=0.5, min_capacity=2)
    tokens = torch.randn(60, HIDDEN, dtype=torch.float32)
    used = [not masked or t % 3 > 0 for t in range(60)]
    limit = -(-sum(used) * 4 // (2 * EXPERTS)) if drop else None
    routing = route(gate, tokens, torch.tensor(used) if masked else None)
    choices, counts, loss = by_hand(gate, tokens, used, limit)
    assert routing.exp_counts.tolist() == counts
    assert routing.l_aux.item() == pytest.approx(loss, rel=1e-5)
    expected = torch.full((60, EXPERTS), -1.0)
    for t, choice in enumerate(choices):
        for e, weight in choice.items():
            expected[t, e] = weight if weight else -1.0
    torch.testing.assert_close(dense(routing), expected, atol=1e-6, rtol=1e-5)
    if drop:
        assert (expected >= 0).sum() < sum(counts)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_layer_computes_the_chosen_experts(k: int) -> None:
    torch.manual_seed(5)
    expert = nn.Sequential(nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN))
    router = RouterConfig(**DEEPSEEK_V3)
    layers = [
        StagedMoE(HIDDEN, expert, EXPERTS, k=k, router=router, drop_tokens=False),
        ScMoE(HIDDEN, expert, EXPERTS, k=k, router=router, drop_tokens=False, merge="add", dispatch="padded"),
        admit_any_tokens(MoE(HIDDEN, expert, EXPERTS, k=k, drop_tokens=False), "deepspeed", router=router),
    ]
    x = torch.randn(7, HIDDEN)
    for layer in layers:
        gate = layer.deepspeed_moe.gate
        gate.wg.weight.data.normal_(0, 0.5)
        gate.e_score_correction_bias.normal_(0, 0.1)
        weights = dense(route(gate, x)).clamp(min=0)
        experts = layer.deepspeed_moe.experts.deepspeed_experts
        expected = sum(weights[:, e : e + 1] * each(x) for e, each in enumerate(experts))
        if isinstance(layer, ScMoE):
            expected = expected + layer.mlp(x)
        output, l_aux, counts = layer(x)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert counts.sum() == 7 * k
        assert l_aux > 0


def test_z_loss_joins_the_gradient_of_the_logits() -> None:
    used = torch.arange(TOKENS) % 4 > 0
    tokens = torch.randn(TOKENS, HIDDEN)
    for router in ({"z_loss_coefficient": 0.1}, {**DEEPSEEK_V3, "z_loss_coefficient": 0.1}):
        for mask in (None, used):
            plain, gate = gate_of({**router, "z_loss_coefficient": 0.0}), gate_of(router)
            assert gate.z_loss is not None
            weight = gate.wg.weight
            loss = route(gate, tokens, mask).weight_KT.square().sum()
            (3 * follow(loss, [gate.z_loss])).backward()
            logits = tokens @ plain.wg.weight.t()
            z = logits.logsumexp(1)[slice(None) if mask is None else mask].square().mean()
            (3 * (route(plain, tokens, mask).weight_KT.square().sum() + 0.1 * z)).backward()
            torch.testing.assert_close(weight.grad, plain.wg.weight.grad)
            torch.testing.assert_close(gate.z_loss.value, z.detach())
    with pytest.raises(RuntimeError, match="z-loss: the gradient of the model's loss is not known"):
        route(gate_of({"z_loss_coefficient": 0.1}), tokens).weight_KT.sum().backward()


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_the_bias_moves_towards_even_loads(rule: str) -> None:
    gate = gate_of({"score_func": "softmax", "load_balance_coeff": 0.01, "load_balance_rule": rule})
    assert gate.balance is not None
    gate.balance.num_experts = EXPERTS - 2  # the last two are identity experts
    before = gate.e_score_correction_bias.clone()
    gate.balance.count(torch.arange(EXPERTS))
    gate.balance.count(torch.arange(EXPERTS))
    counts = gate.balance.take()
    assert counts.tolist() == [2 * e for e in range(EXPERTS)]
    gate.balance.update(counts)
    missing = [1 / EXPERTS - e / sum(range(EXPERTS)) for e in range(EXPERTS - 2)]
    step = [0.01 * ((m > 0) - (m < 0) if rule == "sign" else m) for m in missing] + [0, 0]
    torch.testing.assert_close(gate.e_score_correction_bias - before, torch.tensor(step), atol=1e-7, rtol=1e-4)
    assert gate.balance.take().sum() == 0
    gate.balance.update(torch.zeros(EXPERTS, dtype=torch.int64))
    torch.testing.assert_close(gate.e_score_correction_bias - before, torch.tensor(step), atol=1e-7, rtol=1e-4)


def test_balancing_evens_out_the_loads() -> None:
    gate = gate_of({"score_func": "sigmoid", "load_balance_coeff": 0.01})
    tokens = torch.randn(TOKENS, HIDDEN) + 1.0

    def unevenness() -> float:
        counts = route(gate, tokens).exp_counts
        return float(counts.max() / counts.float().mean())

    before = unevenness()
    gate.balance.take()
    for _ in range(60):
        route(gate, tokens)
        gate.balance.update(gate.balance.take())
    assert before > 2 and unevenness() < 1.2
    gate.balance.take()
    gate.eval()
    route(gate, tokens)
    assert gate.balance.take().sum() == 0  # evaluation does not count


def test_the_bias_stays_in_fp32_and_in_the_state() -> None:
    gate = gate_of(DEEPSEEK_V3)
    bias = gate.e_score_correction_bias.clone()
    gate.bfloat16()
    assert gate.wg.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32 and torch.equal(gate.e_score_correction_bias, bias)
    assert set(gate.state_dict()) == {"wg.weight", "e_score_correction_bias"}
    assert dict(gate.named_parameters()).keys() == {"wg.weight"}  # no optimizer gets it
    other = gate_of(DEEPSEEK_V3)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.e_score_correction_bias, bias)
    route(gate, torch.randn(5, HIDDEN))


@pytest.mark.parametrize("router", [DEEPSEEK_V3, {"score_func": "softmax", "z_loss_coefficient": 0.1}])
def test_no_tokens_and_only_masked_ones(router: dict) -> None:
    gate = gate_of(router)
    none = route(gate, torch.randn(0, HIDDEN, requires_grad=True))
    assert none.exp_counts.tolist() == [0] * EXPERTS and none.weight_KT.shape == (4, 0)
    if gate.z_loss is not None:
        gate.z_loss.factor = torch.tensor(1.0)
    none.l_aux.backward()
    masked = route(gate, torch.randn(3, HIDDEN), torch.zeros(3))
    assert masked.exp_counts.sum() == 0 and masked.weight_KT.abs().sum() == 0
    masked.l_aux.backward()
    assert gate.wg.weight.grad is not None and gate.wg.weight.grad.isfinite().all()


def test_an_excluded_expert_is_not_chosen() -> None:
    expert = nn.Linear(HIDDEN, HIDDEN)
    gate = gate_of({"score_func": "sigmoid"}, k=1)
    tokens = torch.randn(50, HIDDEN)
    first_T = route(gate, tokens).expert_KT[0]
    second_T = route(gate, tokens, exclude_T=first_T).expert_KT[0]
    ranked_TE = (tokens @ gate.wg.weight.t()).argsort(1, descending=True)
    assert torch.equal(first_T, ranked_TE[:, 0]) and torch.equal(second_T, ranked_TE[:, 1])
    with pytest.raises(ValueError, match="num_expert_groups: DGMoE's second choice"):
        DGMoE(HIDDEN, expert, EXPERTS, router=RouterConfig(score_func="sigmoid", **GROUPS))


@pytest.mark.parametrize(
    ("router", "k", "words"),
    [
        ({"score_func": "sigmoid", "num_expert_groups": 5, "num_limited_groups": 2}, 2, "must divide the number of ex"),
        ({"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 1}, 4, "fewer than the 4"),
        ({"score_func": "sigmoid", "num_expert_groups": 12, "num_limited_groups": 4}, 2, "no two best ones"),
        ({"score_func": "sigmoid", "route_norm": True}, 1, "could not learn"),
        ({"route_scale": 2.0}, 2, "DeepSpeed's gate has no such part"),
    ],
)
def test_a_router_that_does_not_fit_is_refused(router: dict, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScMoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), EXPERTS, k=k, router=RouterConfig(**router))
