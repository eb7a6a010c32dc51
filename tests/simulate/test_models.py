"""Sizes of models: parameters and operations are those of the models themselves, built on torch's meta device."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ModelError
from scmoe_ds.models.flops import forward_flops
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.models.swin import SwinMoE
from scmoe_ds.models.swin_settings import SWIN_PRESETS, SwinSettings
from scmoe_ds.overlap import executor
from scmoe_ds.programs.plan_model import model_of, model_of_gpt
from scmoe_ds.simulate import model_flops
from scmoe_ds.simulate.hugging_face import model_of_config
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import AUTOEP
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.model_files import read_model
from scmoe_ds.simulate.parameters import count
from scmoe_ds.simulate.settings import read_settings
from scmoe_ds.simulate.step_work import step_work

SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128}
LLAMA: dict[str, Any] = {"num_key_value_heads": 2, "swiglu": True, "normalization": "RMSNorm"}
SECTIONS: dict[str, dict[str, Any]] = {
    "top-k": {"architecture": "topk"},
    "Residual MoE": {"architecture": "shared_expert"},
    "pipelined": {"architecture": "pipelined_topk", "top_k": 3},
    "overlapped shared expert": {"architecture": "overlapped_shared_expert"},
    "Pos-2": {},
    "Pos-1 in every block, late": {"moe_every": 1, "position": "pos1", "join": "late", "merge": "cg2"},
    "Pos-3 in every fourth, late": {"moe_every": 4, "position": "pos3", "join": "late"},
    "Pos-2 over two blocks": {"moe_every": 4, "shortcut_distance": 2, "merge": "add", "shortcut_norm": "shared"},
    "norm behind": {"post_norm": True, "top_k": 2},
    "narrow experts": {"moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40},
}


def on_meta(build: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = build()
    return model


def gpt(section: dict[str, Any], llama: bool) -> tuple[GPT, Model]:
    """The model, and what the plan knows of it."""
    style = {**LLAMA, "add_bias_linear": False, "position_embedding": "rope", "tie_embeddings": False} if llama else {}
    section = {"num_experts": 4, **section}
    settings = GPTSettings(**SIZES, max_position_embeddings=16, **style)
    flags = {**SIZES, "seq_length": 16}
    if llama:
        plain = {"disable_bias_linear": True, "position_embedding_type": "rope"}
        flags |= {**LLAMA, **plain, "untie_embeddings_and_output_weights": True}
    built: Any = on_meta(lambda: GPT(settings, ScMoEConfig(**section), 16))
    return built, model_of(Namespace(**flags), {"scmoe": section})


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
@pytest.mark.parametrize("llama", [False, True], ids=["GPT-2", "LLaMA"])
def test_a_gpt_has_the_parameters_operations_and_operators_of_its_plan(section: dict[str, Any], llama: bool) -> None:
    built, model = gpt(section, llama)
    method = read_settings({"scmoe": section}, 1).method
    assert method is not None
    held = count(model, method)
    assert held.dense + held.experts == sum(each.numel() for each in built.parameters())
    assert model_flops.forward_flops(model, method) == 16 * forward_flops(built)
    pairs = [pair for each in step_work(model, method, Layout(1)).pairs for pair in [each] * each.count]
    for pair, work in zip(built.runs, pairs, strict=True):
        operators = pair.operators()
        before = [each.label for each in operators if each.before_tap]
        if not isinstance(pair, StagedPair):  # DeepSpeed's own layers have no backbone, and their norm no name
            assert [each.name for each in work.before] == [*before, "norm before tap"]
            continue
        assert [each.name for each in work.before] == before
        assert [each.name for each in work.backbone] == [each.label for each in executor.backbone(pair)]
        window = pair.late_window
        assert (work.late, work.late_after_dispatch) == (window or ((), False))


@pytest.mark.parametrize("section", [{}, {"architecture": "topk"}, {"architecture": "shared_expert"}], ids=str)
def test_a_swin_has_the_parameters_and_operations_of_its_plan(section: dict[str, Any]) -> None:
    sizes = {
        key: value for key, value in SWIN_PRESETS["swin-digits"].items() if key not in ("dataset", "init_method_std")
    }
    renamed = {"img_size": "image_size", "patch_dim": "patch_size"}
    settings = SwinSettings(**{renamed.get(key, key): value for key, value in sizes.items()})
    built: Any = on_meta(lambda: SwinMoE(settings, ScMoEConfig(num_experts=4, **section)))
    model = model_of(Namespace(preset="swin-digits"), {"scmoe": {"num_experts": 4}})
    method = read_settings({"scmoe": section}, 1).method
    assert method is not None
    held = count(model, method)
    assert held.dense + held.experts == sum(each.numel() for each in built.parameters())
    assert model_flops.forward_flops(model, method) == forward_flops(built)


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
HUGGING_FACE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "deepseek_v3": {
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
"""Fourteen types were compared so; longcat_flash differs by what its class allocates for identity experts."""


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_hugging_face_model_has_the_parameters_of_its_config(kind: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[kind](**SMALL, **HEADS, num_experts_per_tok=2, **HUGGING_FACE[kind])
    built = on_meta(lambda: AutoModelForCausalLM.from_config(config))
    (tmp_path / "config.json").write_text(config.to_json_string(), "utf-8")
    model = read_model(tmp_path, 32)
    held = count(model, AUTOEP)
    assert held.dense + held.experts == sum(each.numel() for each in built.parameters())
    assert model.autoep and {stage.tokens for stage in model.stages} == {32}
    moes = sum(pair.count for pair in step_work(model, AUTOEP, Layout(4, expert_parallel=2)).pairs)
    assert moes == (3 if kind in ("mixtral", "qwen2_moe") else 2)


def test_a_split_model_has_all_parameters_once() -> None:
    """Of all ranks together, what is divided is there once; norms, gates and outputs' biases are on each."""
    _, model = gpt({}, llama=False)
    method = read_settings({"scmoe": {}}, 1).method
    assert method is not None
    whole, half = count(model, method), count(model, method, Layout(4, expert_parallel=4, tensor_parallel=2))
    assert half.experts * 4 == whole.experts
    assert whole.dense / 2 < half.dense < 0.6 * whole.dense


def test_files_and_flags_that_describe_no_model_end_in_one_sentence(tmp_path: Path) -> None:
    model = model_of_gpt("tiny", Namespace(**SIZES, seq_length=16), {"num_experts": 4})
    good = json.loads(model.model_dump_json())
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(good), "utf-8")
    assert read_model(file) == model
    bad: dict[str, Any] = {
        "stages.0.experts = ": {"experts": {"num_experts": 4, "hidden": 8, "top_k": 5}},
        "moe_layers has [7]; the stage has blocks 0 … 3": {"moe_layers": [1, 7]},
        "experts are of no block; add moe_layers": {"moe_layers": []},
        "moe_layers have no sizes; add experts": {"experts": None},
        "span = 99 cannot exceed tokens = 16": {"span": 99},
        "heads = 4 must be divisible by kv_heads = 3": {"kv_heads": 3},
        'unknown key; did you mean "hidden"?': {"hiden": 3},
        "must be a whole number": {"layers": 2.5},
    }
    for says, change in bad.items():
        file.write_text(json.dumps({**good, "stages": [{**good["stages"][0], **change}]}), "utf-8")
        with pytest.raises(ModelError) as found:
            read_model(file)
        assert says in str(found.value) and str(file) in str(found.value) and "\n" not in str(found.value)
    mixtral = {"model_type": "mixtral", **SMALL, **HEADS, "num_local_experts": 8, "num_experts_per_tok": 2}
    for values, says in (
        ({"model_type": "llama"}, "is a dense model"),
        ({"model_type": "jetmoe", "num_local_experts": 8}, "is an MoE whose sizes are not known here"),
        ({"model_type": "mixtral", "num_hidden_layers": 2, "hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "qwen3_moe", **SMALL, **HEADS, "num_experts": 4, "decoder_sparse_step": 9}, "no block"),
        ({"model_type": "olmoe"}, "num_hidden_layers: is missing; add it"),
        ({"model_type": "olmoe", "num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be at most 10000"),
        ({**mixtral, "num_attention_heads": 3, "head_dim": 8}, "num_attention_heads = 3: must be divisible by num_key"),
        ({**mixtral, "num_experts_per_tok": 9}, "num_experts_per_tok = 9: cannot exceed the number of experts"),
        ({**mixtral, "vocab_size": 10**30}, "must be at most 1000000000"),
    ):
        with pytest.raises(ModelError, match=says):
            model_of_config(values, "config.json")
    for flags, says in (
        ({"preset": "gpt2-moe-small", "model": "x"}, "remove one"),
        ({"num_layers": 4}, "--hidden-size: is missing"),
        ({"model": "nobody/nothing"}, "no file, no directory"),
        ({**SIZES, "seq_length": 16, "expert_interval": 3}, "must divide --num-layers 4"),
    ):
        with pytest.raises(ModelError, match=says):
            model_of(Namespace(**flags))
