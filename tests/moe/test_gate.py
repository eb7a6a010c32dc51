"""The gate: DeepSpeed's numbers, padding, few tokens, weights by name; in every layer that has one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from scmoe_ds import ScMoE, ScMoEConfig, ScMoEConfigError
from scmoe_ds.inference.model import serving_config
from scmoe_ds.moe.deepspeed_gate import admit_any_tokens
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.shortcut import DGMoE

HIDDEN, EXPERTS = 16, 4
EXACT, PADDED = {"dispatch": "exact"}, {"dispatch": "padded"}


def deepspeeds(*args: object, **kwargs: object) -> MoE:
    return admit_any_tokens(MoE(*args, **kwargs), "deepspeed")


def residual(*args: object, **kwargs: object) -> MoE:
    return deepspeeds(*args, use_residual=True, **kwargs)


LAYERS: dict[str, tuple[Callable[..., MoE], dict]] = {
    "exact": (StagedMoE, EXACT),
    "padded": (StagedMoE, PADDED),
    "DeepSpeed's": (deepspeeds, {}),
    "ScMoE": (ScMoE, EXACT),
    "ScMoE padded": (ScMoE, PADDED),
    "DeepSpeed's Residual MoE": (residual, {}),
    "DGMoE": (DGMoE, EXACT),
    "DGMoE padded": (DGMoE, PADDED),
}
CASES = [(name, k) for name in LAYERS for k in (1, 2, 3) if k == 1 or "DGMoE" not in name]


def make(name: str, k: int, **kwargs: object) -> MoE:
    build, fields = LAYERS[name]
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(), nn.Linear(32, HIDDEN))
    layer = build(HIDDEN, expert, EXPERTS, k=k, **{"min_capacity": 4, **fields, **kwargs})
    for parameter in layer.parameters():  # DeepSpeed's experts start equal, which would hide a mix-up
        parameter.data.normal_(0, 0.3)
    return layer


def results(
    layer: MoE, x: Tensor, used: Tensor | None = None, tap: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    return (*(layer(x, used) if tap is None else layer(x, used, shortcut=tap)), torch.rand(1))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_equals_deepspeeds_gate_to_the_bit(k: int) -> None:
    """Choices, weights, loss and counts, and the random numbers that are left for others."""
    noises = (None, "Jitter", "RSample") if k == 1 else (None, "Jitter")
    for noise, drop, rts, sampling, factor, T, training in product(
        noises, (True, False), (True, False), (True, False), (0.5, 1.3, 6.0), (7, 40), (True, False)
    ):
        gate = TopKGate(HIDDEN, 6, k, factor, 0.7 * factor, 4, noise, drop, rts, None, sampling).train(training)
        x = torch.randn(T, HIDDEN)
        torch.manual_seed(3)
        l_aux, _, _, expert, _, weight, counts = gate(x, None, True)
        after = torch.rand(1)
        torch.manual_seed(3)
        found = route(gate, x)
        case = f"{noise} drop {drop} rts {rts} sampling {sampling} factor {factor} T {T} training {training}"
        for theirs, ours in (
            (l_aux, found.l_aux),
            (expert.long(), found.expert_KT),
            (weight, found.weight_KT),
            (counts, found.exp_counts),
            (after, torch.rand(1)),
        ):
            assert torch.equal(theirs, ours), case


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_masked_tokens_are_as_good_as_absent(name: str, k: int, drop: bool) -> None:
    layer = make(name, k, drop_tokens=drop, capacity_factor=0.6, min_capacity=1)
    x = torch.randn(3, 10, HIDDEN).requires_grad_()
    used = torch.rand(3, 10) < 0.6
    alone = x.detach()[used].requires_grad_()
    tap = torch.randn(3, 10, HIDDEN) if isinstance(layer, StagedMoE) else None
    output, l_aux, counts, after = results(layer, x, used, tap)
    expected, expected_l_aux, expected_counts, expected_after = results(
        layer, alone, tap=None if tap is None else tap[used]
    )
    torch.testing.assert_close(output[used], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(l_aux, expected_l_aux)
    assert torch.equal(counts, expected_counts) and torch.equal(after, expected_after)
    assert not drop or "DGMoE" in name or counts.max() > int(used.sum()) * 0.6 * k / EXPERTS, "nothing is dropped"
    shared = nothing_routed(layer, x)
    torch.testing.assert_close(output[~used], shared[~used], rtol=1e-5, atol=1e-6)
    sources = [x, *layer.parameters()]
    grad, *others = torch.autograd.grad((output[used] ** 2).sum() + l_aux, sources, materialize_grads=True)
    expected_grad, *expected_others = torch.autograd.grad(
        (expected**2).sum() + expected_l_aux, [alone, *sources[1:]], materialize_grads=True
    )
    for one, other in zip(others, expected_others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad[used], expected_grad, rtol=1e-4, atol=1e-5)
    assert not grad[~used].any()


def nothing_routed(layer: MoE, x: Tensor) -> Tensor:
    """What a layer gives where its routed branch gives zeros."""
    if not layer.use_residual:
        return torch.zeros_like(x)
    if getattr(layer, "merge", "cg2") == "cg1":
        return torch.sigmoid(layer.coefficient(x)) * layer.mlp(x)
    return torch.softmax(layer.coefficient(x), -1)[..., 1:] * layer.mlp(x)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(("name", "k"), CASES)
def test_fewer_tokens_than_the_least_capacity(name: str, k: int, drop: bool) -> None:
    """Nothing is dropped then: an expert takes up to four, and the same tokens among many others, without a limit, are
    treated alike."""
    layer = make(name, k, drop_tokens=drop, top2_2nd_expert_sampling=False)
    many = make(name, k, drop_tokens=False, top2_2nd_expert_sampling=False)
    many.load_state_dict(layer.state_dict())
    x = torch.randn(12, HIDDEN)
    for T in (0, 1, 2, 3, 4):
        part = x[:T].clone().requires_grad_()
        output, l_aux, counts, _ = results(layer, part)
        torch.testing.assert_close(output, results(many, x)[0][:T], rtol=1e-5, atol=1e-6)
        assert counts.sum() == T * k * (2 if "DGMoE" in name else 1)
        (output.sum() + l_aux).backward()
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        assert all(grad.isfinite().all() for grad in [part.grad, *gradients])
        if T == 0:
            assert l_aux == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_capacity_is_at_most_the_number_of_used_tokens(k: int) -> None:
    gate, x = make("exact", k, capacity_factor=100.0).deepspeed_moe.gate, torch.randn(9, HIDDEN)
    for used in (None, torch.arange(9) < 3, torch.zeros(9)):
        assert int(route(gate, x, used).capacity) == (9 if used is None else int(used.sum()))


def test_padding_may_hold_anything() -> None:
    """Attention rows that are masked everywhere are NaN in some models."""
    layer, x = make("exact", 2), torch.randn(8, HIDDEN)
    used = torch.arange(8) < 5
    expected = results(layer, x, used)
    x[5:] = float("nan")
    for found, other in zip(results(layer, x, used), expected, strict=True):
        assert torch.equal(found, other)


def test_mask_of_other_tokens() -> None:
    with pytest.raises(
        ValueError, match=r"used_token of shape \(2, 3\): must have one element for each of the 8 tokens"
    ):
        make("exact", 1)(torch.randn(8, HIDDEN), torch.ones(2, 3))


@pytest.mark.parametrize("softmax", ["deepspeed", "all", "chosen", "kept"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_gradient_is_nan_where_all_choices_are_dropped(k: int, softmax: str) -> None:
    """Under the largest loss scale of fp16, and for tokens whose kept experts have no probability to speak of."""
    gate = make("exact", k, capacity_factor=0.1, min_capacity=0).deepspeed_moe.gate
    x = torch.randn(64, HIDDEN).requires_grad_()
    x.data[::2] *= 100
    routing = route(gate, x, softmax=softmax)
    dropped = routing.expert_KT.lt(0)
    assert dropped.all(0).any() and (k == 1 or (dropped.any(0) & ~dropped.all(0)).any())
    assert not routing.weight_KT[dropped].any()
    (65536 * ((routing.weight_KT * torch.randn(k, 64)).sum() + routing.l_aux)).backward()
    assert x.grad.isfinite().all() and gate.wg.weight.grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["exact", "DeepSpeed's"])
def test_weights_by_name_in_layers(name: str, k: int) -> None:
    """Σ weight · expert(x) with experts that give constants: the weights can be read off."""
    layer = make(name, k, drop_tokens=False, top2_2nd_expert_sampling=False)
    for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        expert[2].weight.data.zero_()
        expert[2].bias.data.copy_(torch.eye(HIDDEN)[number])
    x = torch.randn(10, HIDDEN)
    probability = torch.softmax(x @ layer.deepspeed_moe.gate.wg.weight.T, -1)
    top = probability.topk(k, dim=-1)
    for softmax in ("deepspeed", "all", "chosen", "kept"):
        if name == "exact":
            layer.gate_softmax = softmax
        else:
            layer.deepspeed_moe.gate.softmax = softmax
        one = softmax == "all" or (softmax == "deepspeed" and k == 1)
        expected = torch.zeros(10, HIDDEN).scatter(
            1, top.indices, top.values / (1 if one else top.values.sum(1, keepdim=True))
        )
        torch.testing.assert_close(layer(x)[0], expected)


def test_former_names_mean_what_they_did() -> None:
    def parsed(**fields: object) -> str:
        return ScMoEConfig.from_deepspeed({"scmoe": fields}).gate_softmax

    assert parsed() == parsed(gate_softmax="before_topk") == "deepspeed"
    assert parsed(gate_softmax="after_topk") == "kept"
    assert parsed(gate_softmax="after_topk", architecture="topk") == "deepspeed", "which did not read it"
    assert ScMoE(HIDDEN, nn.Linear(HIDDEN, HIDDEN), EXPERTS, gate_softmax="after_topk").gate_softmax == "kept"
    with pytest.raises(ScMoEConfigError, match=r"scmoe\.gate_softmax"):
        parsed(gate_softmax="before")


def test_serving_keeps_the_weights() -> None:
    trained = ScMoEConfig.from_deepspeed({"scmoe": {"architecture": "topk", "gate_softmax": "all"}})
    assert serving_config(trained).gate_softmax == "all"


def test_excluded_experts_of_any_shape() -> None:
    """As a mask: one element for each token."""
    gate, x = make("exact", 1).deepspeed_moe.gate, torch.randn(12, HIDDEN)
    excluded = torch.arange(12) % EXPERTS
    expected = route(gate, x, exclude_T=excluded).expert_KT
    assert not (expected[0] == excluded).any()
    for shape in ((3, 4), (12, 1), (1, 12)):
        assert torch.equal(route(gate, x, exclude_T=excluded.view(shape).int()).expert_KT, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_default_dtype_is_of_no_matter(k: int, dtype: torch.dtype) -> None:
    """Programs for bf16 set it around all that they do. Which tokens are kept does not follow it."""
    layer, x = make("exact", k, capacity_factor=0.5, min_capacity=1), torch.randn(12, HIDDEN)
    mask = torch.arange(12) != 3
    for used in (None, mask):
        torch.manual_seed(7)
        expected = route(layer.deepspeed_moe.gate, x, used)
        torch.manual_seed(7)
        torch.set_default_dtype(dtype)
        try:
            found = route(layer.deepspeed_moe.gate, x, used)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(found.expert_KT, expected.expert_KT) and torch.equal(found.weight_KT, expected.weight_KT)
