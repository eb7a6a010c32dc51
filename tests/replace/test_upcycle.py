"""Dense Hugging Face models whose MLPs have become mixtures of experts, against the dense models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import scmoe_ds
from scmoe_ds import ScMoEConfig, ScMoEConfigError, load_balancing_loss, moe_from_dense
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.upcycle import MoEFeedForward
from tests.helpers.hugging_face import FAMILIES, TEXT_SHAPE, VOCABULARY

TOKENS = (2, 12)


def dense(family: str = "GPT-2", seed: int = 0) -> nn.Module:
    """Without dropout, and with weights at which the MLPs matter: freshly made ones are near zero."""
    if family in ("ViT", "Swin") and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("before transformers 5 their blocks have no MLP of its own")
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def section(**fields: Any) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, "drop_tokens": False, **fields}})


def inputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if hasattr(model.config, "image_size"):
        size = model.config.image_size
        return torch.randn(2, 1, size, size, generator=generator)
    return torch.randint(VOCABULARY, TOKENS, generator=generator)


def logits(model: nn.Module) -> Tensor:
    return model(inputs(model)).logits


def mlps(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name.split(".")[-1] == "mlp"}


def made(model: nn.Module) -> dict[str, MoE]:
    return {name: each.moe for name, each in model.named_modules() if isinstance(each, MoEFeedForward)}


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_the_mlp_whose_weights_add_up_to_one_are_the_mlp(family: str) -> None:
    """DeepSpeed's top-2 gate divides by the sum of both weights: w1 MLP(x) + w2 MLP(x) = MLP(x)."""
    model = dense(family)
    expected, before = logits(model), mlps(model)
    moe_from_dense(model, section(architecture="topk"))
    places = list(before)
    assert list(made(model)) == [places[1], places[3]], "the last of every two blocks"
    for name, moe in made(model).items():
        assert type(moe) is MoE and not moe.use_residual
        assert all(same(each, before[name]) for each in moe.deepspeed_moe.experts.deepspeed_experts)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    before[places[1]].apply(lambda module: [each.data.zero_() for each in module.parameters()])
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5, msg="experts are copies")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_as_scmoe_the_mlp_is_run_on_both_layers(family: str, position: str) -> None:
    """Top-1 with weight 1, added: MLP(normalised input) + MLP(normalised tap), which plain hooks compute here."""
    model = dense(family)
    written, norms, before = copy.deepcopy(model), {"pos2": 1}, mlps(model)
    moe_from_dense(model, section(position=position, merge="add", gate_softmax="after_topk"))
    layers = made(model)
    assert len(layers) == 2 and all(isinstance(each, HookedScMoE) for each in layers.values())
    for name, layer in layers.items():
        assert layer.mlp is before[name], "the shared expert is the MLP"
        assert all(same(each, layer.mlp) for each in layer.deepspeed_moe.experts.deepspeed_experts)
        list_name, number, _ = name.rsplit(".", 2)
        index = int(number) - (position != "pos1")
        add_shortcut(written, name, f"{list_name}.{index}", norms.get(position, 0))
    for _ in range(2):  # the first pass looks for operators
        torch.testing.assert_close(logits(model), logits(written), rtol=1e-5, atol=1e-5)


def add_shortcut(model: nn.Module, mlp_name: str, block_name: str, which: int) -> None:
    """Makes an MLP add what it gives for the input of one of a block's two norms."""
    block, mlp = model.get_submodule(block_name), model.get_submodule(mlp_name)
    norm = [each for each in block.children() if "norm" in type(each).__name__.lower()][which]
    kept: list[Tensor] = []
    norm.register_forward_hook(lambda _, args, output: kept.append(output))
    mlp.register_forward_hook(lambda module, args, output: output + module.forward(kept.pop()))


def test_a_residual_moe_adds_up_to_the_mlp_as_well() -> None:
    """Two coefficients that add up to one, k = 2: (c1 + c2) MLP(x)."""
    model = dense()
    expected = logits(model)
    moe_from_dense(model, section(architecture="shared_expert", top_k=2))
    assert all(type(moe) is MoE and moe.use_residual for moe in made(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_noise_tells_experts_apart_and_is_that_of_their_number() -> None:
    model, again, other = (
        moe_from_dense(dense(), section(), noise=0.01, seed=seed, layers=[1, 3]) for seed in (3, 3, 4)
    )
    layers = list(made(model).values())
    held = [each for layer in layers for each in layer.deepspeed_moe.experts.deepspeed_experts]
    assert not any(same(one, held[second]) for first, one in enumerate(held) for second in range(first))
    for layer in layers:
        for each in layer.deepspeed_moe.experts.deepspeed_experts:
            for name, parameter in each.named_parameters():
                original = layer.mlp.get_parameter(name)
                relative = (parameter - original).square().mean().sqrt() / original.square().mean().sqrt()
                assert 0.005 < relative < 0.02, name
    first = next(iter(made(again).values())).deepspeed_moe.experts.deepspeed_experts[0]
    assert same(first, held[0])
    assert not same(next(iter(made(other).values())).deepspeed_moe.experts.deepspeed_experts[0], held[0])


def test_the_load_balancing_loss_reaches_every_gate() -> None:
    model = dense().train()
    moe_from_dense(model, section(architecture="shared_expert"))
    with pytest.raises(RuntimeError, match="call the model first"):
        load_balancing_loss(model)
    logits(model)
    loss = load_balancing_loss(model)
    assert loss.ndim == 0 and float(loss.detach()) == pytest.approx(
        sum(float(each.l_aux.detach()) for each in model.modules() if isinstance(each, MoEFeedForward))
    )
    loss.backward()
    for moe in made(model).values():
        assert moe.deepspeed_moe.gate.wg.weight.grad.abs().sum() > 0


def test_layers_and_sizes_are_those_asked_for() -> None:
    model = moe_from_dense(dense(), section(num_experts=[2, 4, 8]), layers=[3, 1, 2])
    layers = made(model)
    assert [name.split(".")[2] for name in layers] == ["1", "2", "3"]
    assert [layer.num_experts for layer in layers.values()] == [2, 4, 8]
    assert not any("expert" in name.split(".deepspeed_moe.")[0] for name, _ in model.named_parameters())
    for layer in layers.values():
        assert layer.shortcut_norm is not layer.pair.tap.norm and same(layer.shortcut_norm, layer.pair.tap.norm)
        assert layer.merge == "cg1" and layer.coefficient.out_features == 1


def test_half_precision_and_mode_stay() -> None:
    model = moe_from_dense(dense().to(torch.bfloat16).train(), section())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("place", "is_cut"),
    [
        ({"position": "pos1"}, issubclass(GPT2Block, GradientCheckpointingLayer)),
        ({"position": "pos2"}, True),
        ({"tap": "{block}.ln_1:input"}, False),
    ],
)
def test_gradient_checkpointing_of_hugging_face(place: dict[str, str], is_cut: bool) -> None:
    """It wraps a block's forward, not the call with its hooks: the block's own input is outside of the region. In
    transformers 4.52 it wraps GPT-2's call, and the input is inside."""
    found = []
    for checkpointed in (False, True):
        model = dense().eval()
        moe_from_dense(model, section(**place, use_rts=False))
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):  # the first pass looks for operators
            model.zero_grad()
            (logits(model).square().mean() + load_balancing_loss(model)).backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert [layer.pair._seen[True].in_pieces for layer in made(model).values()] == [not is_cut] * 2
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6)


def replaced_by_hand() -> nn.Module:
    model = dense()
    model.transformer.h[0].mlp = MoE(16, nn.Linear(16, 16), 2)
    return model


def with_experts_of_its_own() -> nn.Module:
    experts = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = transformers.Qwen2MoeConfig(**TEXT_SHAPE, **experts, num_hidden_layers=2, num_key_value_heads=1)
    return transformers.Qwen2MoeForCausalLM(config)


BAD = {
    "no blocks": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        {},
        None,
        "Sequential has no nn.ModuleList of blocks with an MLP",
    ),
    "post-norm model": (
        lambda: transformers.BertModel(transformers.BertConfig(num_hidden_layers=1)),
        {},
        None,
        "BertModel has no nn.ModuleList",
    ),
    "no such block": (dense, {}, [1, 4], r"there is no block 4, the model has 0 … 3"),
    "negative": (dense, {}, [-1], "there is no block -1"),
    "twice": (dense, {}, [1, 1], "each of them once"),
    "none": (dense, {}, [], "at least one block"),
    "too sparse": (dense, {"moe_every": 8}, None, r"scmoe\.moe_every = 8: the model has only 4 blocks"),
    "DeepSpeed's MoE": (replaced_by_hand, {}, None, r"transformer\.h\.0\.mlp is a MoE already"),
    "upcycled": (lambda: moe_from_dense(dense(), section()), {}, None, r"transformer\.h\.1\.mlp\.moe is a MoE already"),
    "another MoE": (
        with_experts_of_its_own,
        {},
        None,
        r"model\.layers\.1\.mlp \(Qwen2MoeSparseMoeBlock\) is a MoE already",
    ),
    "another architecture": (dense, {"architecture": "dgmoe"}, None, 'architecture = "dgmoe"'),
    "a pyramid of another length": (dense, {"num_experts": [2, 4, 8]}, None, "needs 2 numbers"),
    "first block": (dense, {}, [0, 2], r"transformer\.h\.0\.mlp\.moe is in the first block"),
    "ranks": (dense, {"expert_parallel_size": 2}, None, r"call scmoe_ds\.connect\(\) before moe_from_dense"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_upcycled_says_why_and_stays(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    build, fields, layers, message = BAD[case]
    model = build()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ScMoEConfigError, match=message):
        moe_from_dense(model, section(**fields), layers)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_negative_noise_and_dense_models_are_refused() -> None:
    with pytest.raises(ScMoEConfigError, match=r"noise = -1\.0"):
        moe_from_dense(dense(), section(), noise=-1.0)
    with pytest.raises(ScMoEConfigError, match="no layer made by moe_from_dense"):
        scmoe_ds.load_balancing_loss(dense())


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_can_be_copied_after_a_pass(recompute: bool) -> None:
    """By those that keep averaged weights; a block that is computed again keeps what its tap gave."""
    model = moe_from_dense(dense("LLaMA"), section(position="pos2")).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        logits(model).square().mean().backward()
    other = copy.deepcopy(model)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(logits(other), logits(model), atol=1e-3)


@pytest.mark.parametrize("family", ["GPT-2", "LLaMA", "GPT-NeoX"])
def test_slices_have_the_dense_mlp_as_their_mean(family: str) -> None:
    model = dense(family)
    old = {name: copy.deepcopy(module) for name, module in mlps(model).items()}
    width = next(each for each in next(iter(old.values())).parameters()).numel() // TEXT_SHAPE["hidden_size"] // 4
    moe_from_dense(model, section(num_experts=8, moe_ffn_hidden_size=width))
    for name, moe in made(model).items():
        x = torch.randn(5, TEXT_SHAPE["hidden_size"])
        outputs = torch.stack([expert(x) for expert in moe.deepspeed_moe.experts.deepspeed_experts])
        torch.testing.assert_close(outputs[:4].mean(0), old[name](x), atol=1e-5, rtol=1e-4)
        assert torch.equal(outputs[:4], outputs[4:]) and not torch.allclose(outputs[0], outputs[1])
        torch.testing.assert_close(moe.mlp(x), old[name](x))
    assert logits(model).isfinite().all()


def test_widths_that_cannot_be_cut_are_refused() -> None:
    model = dense()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ScMoEConfigError, match=r"moe_ffn_hidden_size = 7: must divide the \d+ neurons of transformer\.h"
    ):
        moe_from_dense(model, section(moe_ffn_hidden_size=7))
    with pytest.raises(
        ScMoEConfigError, match=r"moe_shared_expert_intermediate_size = 8: the shared expert of moe_from"
    ):
        moe_from_dense(model, section(moe_shared_expert_intermediate_size=8))
    assert model.state_dict().keys() == before.keys()
