"""The language models: parameter counts, causality, styles, placements, initialisation."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import parameter_groups
from scmoe_ds.models.distillation import masked_mean
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import MLP, Attention, GPTSettings, RotaryEmbedding, fused_layer_norm_class
from scmoe_ds.models.parallel_layers import vocabulary_cross_entropy
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.overlap.executor import backbone
from scmoe_ds.programs.flags.gpt import build_parser, gpt_settings
from tests.helpers.by_hand import pair_by_hand
from tests.helpers.settings import LLAMA_STYLE as LLAMA

SMALL = dict(num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=64, max_position_embeddings=16)


def build(style: dict[str, Any] | None = None, **section: Any) -> GPT:
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 4, **section}})
    model = GPT(GPTSettings(**{**SMALL, **(style or {})}), config)
    initialize_parameters(model, 1, 0.2, 4)
    return model


def preset_parameters(name: str, architecture: str) -> int:
    preset = PRESETS[name]
    parser = build_parser()
    parser.set_defaults(**preset.arguments)
    section = {
        "num_experts": preset.num_experts,
        "moe_every": preset.moe_every,
        "architecture": architecture,
        "position": "pos1",
    }
    vocabulary = 32000 if name == "llama2-moe" else 50257
    with torch.device("meta"):
        model = GPT(gpt_settings(parser.parse_args([]), vocabulary), ScMoEConfig.from_deepspeed({"scmoe": section}))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gpt2-moe-small", "gpt3-moe-xl", "llama2-moe"])
def test_presets_have_the_papers_parameter_count(name: str) -> None:
    """Table 8 counts the standard top-2 model, without a shared expert."""
    assert preset_parameters(name, "topk") == pytest.approx(PRESETS[name].paper_parameters, rel=0.03)


def test_medium_differs_from_the_papers_count_by_its_dense_mlps_and_embeddings() -> None:
    """1.87e9 by the sizes of table 8; the printed 1.7e9 is what experts and attention alone add up to."""
    layers, D, experts = 24, 1024, 16
    attention, mlp = 4 * D * D + 4 * D, 8 * D * D + 5 * D
    assert layers * attention + layers // 2 * experts * mlp == pytest.approx(1.7e9, rel=0.01)
    assert preset_parameters("gpt2-moe-medium", "topk") == pytest.approx(1.867e9, rel=1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_scmoe_adds_one_shared_mlp_a_norm_and_a_coefficient_per_moe_layer(name: str) -> None:
    settings = PRESETS[name].arguments
    moe_layers = settings["num_layers"] // PRESETS[name].moe_every
    D = settings["hidden_size"]
    mlp = 3 * D * 5440 if "llama" in name else 8 * D * D + 5 * D
    norm = D if "llama" in name else 2 * D
    added = preset_parameters(name, "scmoe") - preset_parameters(name, "topk")
    assert added == moe_layers * (mlp + norm + D + 1)


@pytest.mark.parametrize("style", [{}, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("architecture", ["scmoe", "topk", "shared_expert", "dgmoe"])
def test_a_token_sees_no_later_one(architecture: str, style: dict) -> None:
    model = build(style, architecture=architecture, drop_tokens=False).eval()
    tokens = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 7) % 64
    with torch.no_grad():
        before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[0, :9], before[0, :9], rtol=1e-5, atol=1e-5)
    assert (after[0, 9:] - before[0, 9:]).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["scmoe", "topk", "shared_expert", "dgmoe"])
@pytest.mark.parametrize(("moe_every", "position"), [(1, "pos1"), (2, "pos2"), (2, "pos3"), (4, "pos2")])
def test_every_parameter_gets_a_gradient(moe_every: int, position: str, architecture: str) -> None:
    model = build(moe_every=moe_every, position=position, architecture=architecture, drop_tokens=False)
    tokens = torch.randint(64, (4, 16))
    output = model(tokens, tokens)
    output.loss.backward()
    assert torch.allclose(output.loss, output.lm_loss + 0.01 * output.moe_loss)
    assert len(output.exp_counts) == 4 // moe_every
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_first_layer_position_and_schedules() -> None:
    model = build(position="pos2", first_layer_position="pos1")
    names = [[operator.label for operator in backbone(pair)] for pair in model.scheduled_pairs()]
    assert names == [["attention", "shared"], ["mlp", "attention", "shared"]]
    # Half of the FLOPs: pos2 is mlp, attention, shared = 16384, ~9216, 16384 per token.
    assert [pair.schedule.expert_slot for pair in model.scheduled_pairs()] == [2, 2]
    assert build(overlap={"expert_slot": 3}).scheduled_pairs()[0].schedule.expert_slot == 3
    assert not build(overlap={"enabled": False}).scheduled_pairs()[0].schedule.overlap


@pytest.mark.parametrize(
    ("position", "norm"),
    [("pos1", "blocks.1.attention_norm"), ("pos2", "blocks.0.mlp_norm"), ("pos3", "blocks.0.attention_norm")],
)
def test_shared_norm_is_the_one_through_which_the_backbone_reads_the_same_value(position: str, norm: str) -> None:
    pair = build(position=position, shortcut_norm="shared").scheduled_pairs()[0]
    assert pair.shortcut_norm is None
    seen = []
    handle = pair.get_submodule(norm).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    pair(torch.randn(1, 8, 32))
    handle.remove()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"position": "pos1", "shortcut_norm": "shared"},
        {"architecture": "dgmoe"},
        {"position": "pos3", "shortcut_norm": "shared"},
        {"architecture": "shared_expert"},
        {"architecture": "overlapped_shared_expert"},
        {"moe_every": 1, "position": "pos1"},
        {"architecture": "topk"},
        {"architecture": "pipelined_topk"},
    ],
    ids=str,
)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_norm_placement_and_residual_scale_against_sums_that_are_written_out(placement: str, section: dict) -> None:
    model = build({"norm_placement": placement, "residual_scale": 0.5}, drop_tokens=False, **section).eval()
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # norms that can be told apart
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3
    assert all(
        block.pre_norm == (placement == "pre") and block.scale == 0.5 for pair in model.runs for block in pair.blocks
    )
    hidden = torch.randn(2, 8, 32)
    for pair in model.runs:
        values, hidden = pair_by_hand(pair, hidden), pair(hidden).hidden
        torch.testing.assert_close(hidden, values[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_placement": "before"}, "--norm-placement before is neither"),
        ({"residual_scale": 0.0}, "--residual-scale 0 must be a positive"),
        ({"residual_scale": float("nan")}, "--residual-scale nan"),
    ],
)
def test_settings_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTSettings(**SMALL, **change)


def test_post_norm_is_applied_to_the_merged_output() -> None:
    pair = build(post_norm=True).scheduled_pairs()[0].eval()
    hidden = torch.randn(1, 8, 32)
    with_norm = pair(hidden).hidden
    pair.post_norm.weight.data.zero_()
    without_moe = pair(hidden).hidden
    pair.post_norm.weight.data.fill_(1.0)
    update = with_norm - without_moe
    torch.testing.assert_close(update.std(-1, unbiased=False), torch.ones(1, 8), rtol=1e-3, atol=1e-3)


def test_dropout_changes_training_only() -> None:
    model = build({"hidden_dropout": 0.5, "attention_dropout": 0.5}, drop_tokens=False)
    tokens = torch.randint(64, (1, 16))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_grouped_heads_equal_repeated_ones() -> None:
    settings = GPTSettings(**{**SMALL, "num_key_value_heads": 2, "position_embedding": "rope"})
    grouped = Attention(settings)
    full = Attention(GPTSettings(**{**SMALL, "position_embedding": "rope"}))
    size = settings.head_size

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        query, key, value = tensor.split([4 * size, 2 * size, 2 * size])
        wide = [part.unflatten(0, (2, size)).repeat_interleave(2, 0).flatten(0, 1) for part in (key, value)]
        return torch.cat([query, *wide])

    full.query_key_value.weight.data = repeat(grouped.query_key_value.weight.data)
    full.query_key_value.bias.data = repeat(grouped.query_key_value.bias.data)
    full.output.load_state_dict(grouped.output.state_dict())
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_only() -> None:
    rotary = RotaryEmbedding(8, 10000.0)
    query, key = torch.randn(8), torch.randn(8)
    q, k = rotary(torch.stack([query, key]).repeat(1, 16, 1, 1))[0].unbind(1)
    scores = q @ k.T
    for distance in range(1, 8):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.norm(dim=-1), query.norm().expand(16), rtol=1e-5, atol=1e-5)


def test_masked_loss_is_the_mean_over_unmasked_tokens() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0]])
    kept = [F.cross_entropy(logits[b, s], labels[b, s]) for b, s in mask.nonzero().tolist()]
    losses = vocabulary_cross_entropy(logits, labels, None)
    torch.testing.assert_close(masked_mean(losses, mask), torch.stack(kept).mean())
    assert masked_mean(losses, torch.zeros(2, 5)) == 0


def test_initialisation_depends_on_seed_and_name_only() -> None:
    model, again = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = build()
    initialize_parameters(other, 2, 0.2, 4)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)
    layer = "runs.0.blocks.1.moe.deepspeed_moe.experts.deepspeed_experts"
    weights = dict(model.named_parameters())
    assert not torch.equal(weights[f"{layer}.0.input.weight"], weights[f"{layer}.1.input.weight"])
    assert weights["runs.0.blocks.0.mlp.output.weight"].std().item() == pytest.approx(0.2 / 8**0.5, rel=0.1)
    assert (weights["final_norm.weight"] == 1).all() and (weights["runs.0.blocks.0.mlp.input.bias"] == 0).all()


def test_no_dense_parameter_has_the_word_that_breaks_deepspeeds_checkpoints() -> None:
    model = build(shortcut_norm="own", post_norm=True)
    routed = ".deepspeed_moe.experts.deepspeed_experts."
    assert [name for name, _ in model.named_parameters() if "expert" in name and routed not in name] == []


def test_apex_is_used_only_if_it_is_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index has an unrelated package of that name; it has no apex.normalization."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.normalization", raising=False)
    assert fused_layer_norm_class() is nn.LayerNorm
    nvidia = types.ModuleType("apex.normalization")
    nvidia.FusedLayerNorm = type("FusedLayerNorm", (nn.LayerNorm,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.normalization", nvidia)
    assert fused_layer_norm_class() is nvidia.FusedLayerNorm


def test_apex_is_no_requirement() -> None:
    from pathlib import Path

    root = Path(__file__).parents[2]
    for file in ("requirements.txt", "constraints.txt", "pyproject.toml"):
        lines = [line.split("#")[0] for line in (root / file).read_text().splitlines()]
        assert not any(line.strip().lower().startswith("apex") for line in lines), file


def test_rotary_angles_stay_fp32_in_a_bf16_model() -> None:
    rotary = RotaryEmbedding(8, 10000.0).bfloat16()
    heads = torch.ones(1, 1000, 1, 8, dtype=torch.bfloat16)
    exact = RotaryEmbedding(8, 10000.0)(heads.float())
    torch.testing.assert_close(rotary(heads).float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_rotary_positions_are_rounded_once(dtype: torch.dtype) -> None:
    rotary, places = RotaryEmbedding(8, 10000.0), torch.tensor([[4, 5, 9], [0, 1, 2]])
    angle_BSX = places.unsqueeze(2) * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones_like(angle_BSX), angle_BSX).to(torch.complex128).unsqueeze(2)
    heads = torch.randn(2, 3, 2, 8, dtype=dtype, requires_grad=True)
    pairs = torch.complex(*heads.detach().double().chunk(2, dim=3)).requires_grad_()
    output, exact = rotary(heads, places, 16), pairs * turn
    direction = torch.randn(2, 3, 2, 8, dtype=dtype)
    (grad,) = torch.autograd.grad(output, heads, direction)
    (expected,) = torch.autograd.grad(exact, pairs, torch.complex(*direction.double().chunk(2, dim=3)))
    for found, pair in ((output, exact), (grad, expected)):
        torch.testing.assert_close(
            found.double(), torch.cat([pair.real, pair.imag], dim=3), rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-6
        )


def test_llama_attention_and_swiglu_against_plain_formulas() -> None:
    settings = GPTSettings(**{**SMALL, **LLAMA, "num_key_value_heads": 4})
    attention, mlp = Attention(settings), MLP(settings)
    x = torch.randn(1, 6, 32)
    query, key, value = (x @ part.T for part in attention.query_key_value.weight.split(32))
    frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)

    def rotate(vector: torch.Tensor, position: int) -> torch.Tensor:
        angle = position * frequencies
        a, b = vector[:4], vector[4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    rows = []
    for s in range(6):
        heads = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            q = rotate(query[0, s, part], s)
            scores = torch.stack([q @ rotate(key[0, t, part], t) / 8**0.5 for t in range(s + 1)])
            heads.append((torch.softmax(scores, 0).unsqueeze(1) * value[0, : s + 1, part]).sum(0))
        rows.append(torch.cat(heads) @ attention.output.weight.T)
    torch.testing.assert_close(attention(x)[0], torch.stack(rows), rtol=1e-4, atol=1e-5)
    gate, up = (x @ part.T for part in mlp.input.weight.split(settings.ffn_hidden_size))
    torch.testing.assert_close(mlp(x), (gate * torch.sigmoid(gate) * up) @ mlp.output.weight.T, rtol=1e-4, atol=1e-5)


def test_biases_and_norms_have_no_weight_decay() -> None:
    model = build()
    decayed, plain = parameter_groups(model)
    assert "weight_decay" not in decayed and plain["weight_decay"] == 0.0
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
