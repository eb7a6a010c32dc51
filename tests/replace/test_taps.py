"""Taps of models that others wrote, by value: the residual stream, whatever a block calls its norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds import ScMoEConfig, ScMoEConfigError, moe_from_dense, replace_moe_layers
from scmoe_ds.replace.layer import HookedScMoE

SIZES = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# The module whose output a block adds last, and what it is multiplied by.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("mlp", {}),
    "gemma": ("mlp", {}),
    "gemma2": ("post_feedforward_layernorm", {}),
    "gemma3_text": ("post_feedforward_layernorm", {}),
    "olmo2": ("post_feedforward_layernorm", {}),
    "olmo3": ("post_feedforward_layernorm", {}),
    "exaone4": ("post_feedforward_layernorm", {}),
    "glm4": ("post_mlp_layernorm", {"partial_rotary_factor": 1.0}),
    "granite": ("mlp", {"residual_multiplier": 0.25}),
    "helium": ("mlp", {}),
    "nemotron": ("mlp", {}),
    "phi3": ("mlp", {"resid_pdrop": 0.3}),
    "qwen3": ("mlp", {}),
    "seed_oss": ("mlp", {"residual_dropout": 0.3}),
    "smollm3": ("mlp", {}),
    "starcoder2": ("mlp", {"residual_dropout": 0.3}),
    "vaultgemma": ("mlp", {}),
}


def config(**fields: Any) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 2, "min_capacity": 1, **fields}})


def family(kind: str, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    shape = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields})
    return transformers.AutoModelForCausalLM.from_config(shape).float()


def first_pair(model: nn.Module) -> Any:
    return next(layer.pair for layer in model.modules() if isinstance(layer, HookedScMoE))


def run_and_watch(model: nn.Module, last: str) -> dict[str, Tensor]:
    """The tapped value, and what enters the tapped block, leaves it, and was added last in it."""
    pair, seen = first_pair(model), {}
    block, take = pair.tap.blocks[0][1], pair._take

    def note(name: str) -> Any:
        return lambda _, args, output: seen.update({name: output[0] if isinstance(output, tuple) else output})

    pair._take = lambda value: seen.update(tapped=value) or take(value)
    block.register_forward_pre_hook(lambda _, args: seen.update(entered=args[0]))
    block.register_forward_hook(note("left"))
    block.get_submodule(last).register_forward_hook(note("added"))
    model(torch.arange(3, 15).view(2, 6))
    return seen


@pytest.mark.parametrize("kind", FAMILIES)
def test_pos2_taps_the_residual_stream(kind: str) -> None:
    last, fields = FAMILIES[kind]
    model = moe_from_dense(family(kind, **fields).eval(), config(position="pos2"))
    seen = run_and_watch(model, last)
    expected = seen["left"] - fields.get("residual_multiplier", 1.0) * seen["added"]
    torch.testing.assert_close(seen["tapped"], expected, rtol=1e-5, atol=1e-5)
    assert (seen["tapped"] - seen["entered"]).abs().max() > 1e-3, "not the block's input"
    for position in ("pos1", "pos3"):
        model = moe_from_dense(family(kind, **fields).eval(), config(position=position))
        seen = run_and_watch(model, last)
        assert torch.equal(seen["tapped"], seen["entered"])


@pytest.mark.parametrize("kind", ["phi3", "starcoder2", "granite", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scale_and_rounding_do_not_disturb_the_check(kind: str, dtype: torch.dtype) -> None:
    model = moe_from_dense(family(kind, **FAMILIES[kind][1]).to(dtype).train(), config())
    for _ in range(2):
        model(torch.arange(3, 15).view(2, 6)).logits.float().mean().backward()


def test_attention_and_mlp_side_by_side() -> None:
    model = moe_from_dense(family("gpt_neox", use_parallel_residual=True).eval(), config())
    seen = run_and_watch(model, "mlp")
    assert torch.equal(seen["tapped"], seen["entered"]), "both read the block's input"


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_norms_behind_the_sums_are_refused_by_value(position: str) -> None:
    """OpenAI's first GPT calls its norms as GPT-2 does, and has them elsewhere."""
    shape = transformers.OpenAIGPTConfig(vocab_size=48, n_positions=16, n_embd=16, n_layer=4, n_head=2)
    model = moe_from_dense(transformers.OpenAIGPTLMHeadModel(shape).eval(), config(position=position))
    with pytest.raises(
        ScMoEConfigError, match=r"transformer\.h\.1\.mlp\.moe: its tap, .*; name a module .* scmoe\.tap"
    ):
        model(torch.arange(3, 15).view(2, 6))


class Sandwich(nn.Module):
    """A block of somebody else's whose post_attention_layernorm normalises the attention's output."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(8, 8), feed_forward
        self.input_layernorm, self.post_attention_layernorm, self.before_mlp = (nn.LayerNorm(8) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.post_attention_layernorm(self.attention(self.input_layernorm(hidden)))
        output = self.mlp(self.before_mlp(hidden))
        return hidden + (output[0] if isinstance(output, tuple) else output)


def sandwiches() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Sandwich(nn.Linear(8, 8)), Sandwich(MoE(8, nn.Linear(8, 8), 2, k=1, min_capacity=1)))


def test_a_norm_of_the_branch_is_refused_and_the_remedy_works() -> None:
    model = replace_moe_layers(sandwiches(), config(position="pos2"))
    with pytest.raises(
        ScMoEConfigError, match=r"the input of 0\.post_attention_layernorm, is not the block's input plus"
    ):
        model(torch.randn(2, 4, 8))
    for tap in ("{previous}.before_mlp:input", "{previous}.mlp:input", "0.before_mlp:input"):  # whole paths are allowed
        model = replace_moe_layers(sandwiches(), config(tap=tap))
        for _ in range(2):
            model(torch.randn(2, 4, 8)).square().mean().backward()
        assert [operator.label for operator in first_pair(model).operators()] == ["mlp", "attention", "shared"]


class Apart(nn.Module):
    """No list of blocks: two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = sandwiches()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden))


def test_blocks_are_found_without_a_module_list() -> None:
    model = replace_moe_layers(Apart(), config(tap="{previous}.before_mlp:input"))
    assert first_pair(model).tap.module_name == "first.before_mlp"
    model = Apart()
    del model.first
    model.other = nn.Linear(8, 8)
    with pytest.raises(ScMoEConfigError, match="among no blocks of one class"):
        replace_moe_layers(model, config())
    replace_moe_layers(model, config(tap="second.before_mlp:input"))
    model.forward = lambda hidden: model.second(model.other(hidden))
    model(torch.randn(2, 4, 8))


class InAList(nn.Module):
    """As DeepSpeedExamples' CIFAR: the MoE layers are a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.middle, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.moes = nn.ModuleList([MoE(8, nn.Linear(8, 8), 2, k=1, min_capacity=1) for _ in range(2)])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.middle(self.norm(hidden))
        for moe in self.moes:
            hidden = hidden + moe(hidden)[0]
        return self.head(hidden)


def test_layers_in_a_list_of_their_own_take_a_tap_by_its_path() -> None:
    model = replace_moe_layers(InAList(), config(tap="norm:input"))
    for _ in range(2):
        model(torch.randn(2, 4, 8)).square().mean().backward()
    names = [[operator.label for operator in layer.pair.operators()] for layer in model.moes]
    assert names == [["middle", "shared"], ["middle", "moes.0", "shared"]]
    with pytest.raises(ScMoEConfigError, match=r"moes\.0 .*has no norm"):
        replace_moe_layers(InAList(), config(position="pos1"))


class Storey(nn.Module):
    """A block whose names nobody knows."""

    def __init__(self, think: nn.Module) -> None:
        super().__init__()
        self.quiet, self.calm, self.think = nn.LayerNorm(8), nn.LayerNorm(8), think


def test_a_block_of_unknown_names_is_told_its_norms() -> None:
    model = nn.Sequential(Storey(nn.Linear(8, 8)), Storey(MoE(8, nn.Linear(8, 8), num_experts=2)))
    with pytest.raises(ScMoEConfigError, match=r"e\.g\. .*:input\" \(it has quiet, calm\)"):
        replace_moe_layers(model, config())


def test_an_mlp_that_wants_more_than_the_hidden_states_is_refused() -> None:
    shape = transformers.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2)
    with pytest.raises(ScMoEConfigError, match=r"transformer\.h\.1\.mlp \(BloomMLP\) takes residual beside .*leave"):
        moe_from_dense(transformers.BloomForCausalLM(shape), config())
