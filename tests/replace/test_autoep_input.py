"""Bad input beside "expert_parallel": one sentence each, before DeepSpeed changes the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

import scmoe_ds
from lab.moe_families import tiny
from scmoe_ds.compat_transformers import accept_names_of_recorders
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.attach import prepare_autoep
from scmoe_ds.errors import ScMoEConfigError


def whole(scmoe: dict[str, Any] | None = None, /, **autoep: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "expert_parallel": {"enabled": True, **autoep},
        "zero_optimization": {"stage": 1},
        "scmoe": scmoe or {},
    }


JSONS = {
    "sizes are the model's": (whole({"num_experts": 8}), r"scmoe\.num_experts = 8: with expert_parallel .* decides it"),
    "no capacity": (whole({"drop_tokens": False}), r"scmoe\.drop_tokens = false: .* no token is dropped"),
    "expert-parallel size": (whole({"expert_parallel_size": 2}), r"expert_parallel\.autoep_size says it"),
    "replaced twice": (whole({"replace": True}), r"scmoe\.replace = true: .*AutoEP replaces the layers"),
    "architecture": (whole({"architecture": "topk"}), r'architecture = "topk": with expert_parallel, use "as_is"'),
    "padded": (whole({"dispatch": "padded"}), r'scmoe\.dispatch = "padded": .*use "exact"'),
    "DeepEP": (whole(comm_backend="deepep"), r'comm_backend = "deepep": .*use "comm"'),
    "unknown key": (whole(autoep_sizes=2), r'expert_parallel\.autoep_sizes: unknown key \(did you mean "autoep_size"'),
    "size as text": (whole(autoep_size="2"), r'autoep_size = "2": is a string'),
    "size 0": (whole(autoep_size=0), r"autoep_size = 0: must be greater than 0"),
    "not enabled": ({**whole(), "expert_parallel": {"enabled": False}}, r"expert_parallel = .*is not enabled"),
    "AutoTP": ({**whole(), "tensor_parallel": {"autotp_size": 2}}, r"autotp_size = 2: divides what"),
    "sequence parallelism": ({**whole(), "sequence_parallel_size": 2}, r"sequence_parallel_size = 2: divides what"),
    "as_is alone": ({"scmoe": {"architecture": "as_is"}}, r'"as_is": is for Hugging Face models'),
}


@pytest.mark.parametrize("case", JSONS)
def test_json(case: str) -> None:
    given, message = JSONS[case]
    with pytest.raises(ScMoEConfigError, match=message) as error:
        ScMoEConfig.from_deepspeed(given)
    assert len(str(error.value).splitlines()) == 1


def test_zero_3_and_universal_checkpoints_are_for_autoep() -> None:
    given = {**whole(), "zero_optimization": {"stage": 3}, "checkpoint": {"load_universal": True}}
    assert ScMoEConfig.from_deepspeed(given).architecture == "as_is"
    with pytest.raises(ScMoEConfigError, match="stage = 3"):
        ScMoEConfig.from_deepspeed({key: value for key, value in given.items() if key != "expert_parallel"})


class OfPeft(nn.Module):
    """As peft wraps a module."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.base_model = wrapped


OfPeft.__module__ = "peft.tuners.lora.layer"


def shared(part: str) -> nn.Module:
    model = tiny("qwen3_moe")
    first, second = (layer.mlp for layer in model.model.layers)
    if part == "block":
        model.model.layers[1].mlp = first
    else:
        second.experts = first.experts
    return model


def adapted() -> nn.Module:
    model = tiny("qwen3_moe")
    model.model.layers[1].mlp.experts = OfPeft(model.model.layers[1].mlp.experts)
    return model


def other_family() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    return transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no experts": (lambda: tiny("qwen3_moe", mlp_only_layers=[0, 1]), {}, "has no block with experts"),
    "no preset": (
        other_family,
        {},
        r'no preset for GraniteMoeForCausalLM \(model_type "granitemoe"\), only for .*olmoe',
    ),
    "another preset": (
        lambda: tiny("qwen3_moe"),
        {"preset_model": "deepseek_v3"},
        r'preset_model = "deepseek_v3": the model is of the family "qwen3_moe"',
    ),
    "world": (lambda: tiny("qwen3_moe"), {"autoep_size": 2}, r"autoep_size = 2: must divide the world size 1; start 2"),
    "shared block": (lambda: shared("block"), {}, r"layers\.0\.mlp and model\.layers\.1\.mlp share their experts"),
    "shared experts": (lambda: shared("experts"), {}, r"layers\.0\.mlp and model\.layers\.1\.mlp share their experts"),
    "adapted experts": (adapted, {}, r"layers\.1\.mlp\.experts is a OfPeft of peft, .*merge_and_unload"),
    "adapted model": (
        lambda: OfPeft(tiny("qwen3_moe")),
        {},
        r'moe_layer_pattern to "base_model\\\\\.model\\\\\.layers\\\\\.\\\\d\+\\\\\.mlp"',
    ),
}


def test_deepspeed_puts_an_entry_back_where_it_was() -> None:
    """With another model's entry, models that were there before record no router logits."""
    capturing = pytest.importorskip("transformers.utils.output_capturing")
    if type(registry := capturing._CAN_RECORD_REGISTRY) is dict:
        pytest.skip("an earlier transformers, which is asked with names")
    accept_names_of_recorders()
    model = tiny("mixtral").model
    name = str(type(model))
    original = registry.get(name)
    assert "router_logits" in original
    dict.update(registry, {name: {}})  # as DeepSpeed does, for a moment
    registry[name] = original
    assert registry.get(model) is original
    assert str(str) not in registry


def test_clipping_without_zero() -> None:
    """Each rank takes the norm over its own experts then."""
    without = {**whole(autoep_size=2), "zero_optimization": {"stage": 0}}
    with pytest.raises(ScMoEConfigError, match=r"zero_optimization\.stage = 0: .*norm that is too small; set stage 1"):
        prepare_autoep(tiny("qwen3_moe"), without)


@pytest.mark.parametrize("case", MODELS)
def test_model(case: str) -> None:
    make, autoep, message = MODELS[case]
    scmoe_ds.connect()
    with pytest.raises(ScMoEConfigError, match=message) as error:
        prepare_autoep(make(), whole(**autoep))
    assert len(str(error.value).splitlines()) == 1


def test_experts_that_the_ranks_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    with pytest.raises(
        ScMoEConfigError, match=r"must divide the 8 experts of model\.layers\.0\.mlp; use one of 1, 2, 4, 8"
    ):
        prepare_autoep(tiny("qwen3_moe"), whole(autoep_size=3))
