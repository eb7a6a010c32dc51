"""Small Hugging Face MoE models with random weights, one of each family; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, SEQUENCE, EXPERTS, TOP_K = 64, 16, 8, 3
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": TOP_K,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
_DEEPSEEK = {**_SHAPE, **_LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": EXPERTS}
_SHARED = {"n_shared_experts": 2, "first_k_dense_replace": 0, "routed_scaling_factor": 1.5}
_QWEN = {**_SHAPE, "moe_intermediate_size": 16, "num_experts": EXPERTS, "decoder_sparse_step": 1}


def _model(name: str, text: str = "", **settings: Any) -> Callable[[Mapping[str, Any]], nn.Module]:
    def make(more: Mapping[str, Any]) -> nn.Module:
        config = getattr(transformers, f"{name}{text}Config")(**{**settings, **more})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _longcat(more: Mapping[str, Any]) -> nn.Module:
    """A decoder layer, of two attentions, counts as two hidden layers."""
    given = {"num_hidden_layers": 2, **more}
    own = {
        "num_layers": given.pop("num_hidden_layers"),
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "moe_topk": TOP_K,
        "n_routed_experts": EXPERTS,
        "zero_expert_num": 4,
        "expert_ffn_hidden_size": 16,
        "routed_scaling_factor": 2.0,
    }
    left_out = ("num_hidden_layers", "num_key_value_heads", "num_experts_per_tok", "intermediate_size")
    shape = {key: value for key, value in {**_SHAPE, **_LATENT}.items() if key not in left_out}
    model = _model("LongcatFlash", **shape, **own)(given)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.experts.gate_up_proj.data[EXPERTS:] = 0.0  # which nobody reads, and exports write so
    return model


FAMILIES: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "mixtral": _model("Mixtral", **_SHAPE, num_local_experts=EXPERTS),
    "qwen2_moe": _model("Qwen2Moe", **_QWEN, shared_expert_intermediate_size=24),
    "qwen3_moe": _model("Qwen3Moe", **_QWEN, head_dim=8),
    "qwen3_5_moe": _model(
        "Qwen3_5Moe",
        "Text",
        **{key: value for key, value in _QWEN.items() if key != "decoder_sparse_step"},
        head_dim=8,
        shared_expert_intermediate_size=24,
        layer_types=["full_attention"] * 2,
    ),
    "deepseek_v2": _model(
        "DeepseekV2", **_DEEPSEEK, **_SHARED, topk_method="group_limited_greedy", n_group=4, topk_group=2
    ),
    "deepseek_v3": _model("DeepseekV3", **_DEEPSEEK, **_SHARED, n_group=4, topk_group=2),
    "glm4_moe": _model(
        "Glm4Moe",
        **_SHAPE,
        **_SHARED,
        moe_intermediate_size=16,
        n_routed_experts=EXPERTS,
        n_group=1,
        topk_group=1,
        head_dim=8,
    ),
    "minimax_m3": _model(
        "MiniMaxM3VL",
        "Text",
        **_SHAPE,
        num_local_experts=EXPERTS,
        head_dim=8,
        rotary_dim=8,
        dense_intermediate_size=48,
        shared_intermediate_size=24,
    ),
    "longcat_flash": _longcat,
    "olmoe": _model("Olmoe", **_SHAPE, num_experts=EXPERTS),
}


def tiny(family: str, seed: int = 1, **more: Any) -> nn.Module:
    """A model of a family, the same on every rank.

    Args:
        more: settings of its config in the place of those here.
    """
    torch.manual_seed(seed)
    model = FAMILIES[family](more)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zero in an untrained model: a forgotten one would not show
            buffer.uniform_(-0.2, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith(
            ("gate.weight", "classifier.weight")
        ):  # untrained routers choose by differences that rounding can turn over
            nn.init.normal_(parameter, std=0.5)
    return model


def batch(step: int, rank: int, size: int = 2, sequence: int = SEQUENCE) -> dict[str, torch.Tensor]:
    """Tokens of a step for a rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCABULARY, (size, sequence), generator=generator)
    return {"input_ids": tokens, "labels": tokens}
