"""Floating-point operations of a forward pass, from the model's shape; the numerator of MFU.

Counted are the products of the model, two operations for a multiplication and an addition:

    attention    query, key, value and output projections; scores and mixing, their causal half in a GPT
    MLP          its two projections (three with SwiGLU)
    MoE          the gate, top_k experts per token, the shared expert, the coefficient network; DGMoE gates twice
    head         the logits, over the padded vocabulary

A backward pass takes twice as many, so a training step has 3 × these (Narayanan et al. 2021, arXiv 2104.04473,
appendix). By the convention of MFU (PaLM, arXiv 2204.02311, appendix B) what is computed again does not count. Neither
do padding in buffers, norms, activation functions, and DeepSpeed's einsums that sort tokens. A token that the capacity
limit drops counts as if its expert had computed it: the number depends on the shape alone. Swin's small network for
position biases, which runs once per batch, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.models.swin_settings import STAGES, SwinSettings, routing_of_stage

if TYPE_CHECKING:  # transformers' Swinv2 takes a second to import
    from scmoe_ds.models.swin import SwinMoE

_SHARED = ("shared_expert", "overlapped_shared_expert", "scmoe")
_COEFFICIENTS = {"add": 0, "cg1": 1, "cg2": 2}


def forward_flops(model: GPT | SwinMoE) -> float:
    """Operations of the whole model, on all ranks together: per token of a GPT, per image of a SwinV2-MoE."""
    if isinstance(model, GPT):
        pairs = [pair.running if isinstance(pair, StagedPair) else pair for pair in model.runs]
        return _gpt(model.settings, [pair.config for pair in pairs], model.config, model.sequence)
    return _swin(model.settings, model.config)


def _gpt(settings: GPTSettings, sections: Sequence[ScMoEConfig], config: ScMoEConfig, sequence: int) -> float:
    """`sections`: what each MoE layer follows."""
    D, H = settings.hidden_size, settings.head_size
    queries, keys = settings.num_attention_heads * H, settings.num_key_value_heads * H
    attention = 2 * D * (2 * queries + 2 * keys) + 2 * sequence * queries
    per_width, width = 2 * D * (3 if settings.swiglu else 2), settings.ffn_hidden_size
    mlp = per_width * width
    expert = per_width * (config.moe_ffn_hidden_size or width)
    shared = per_width * (config.moe_shared_expert_intermediate_size or width)
    moes = len(sections)
    of_moes = sum(
        _moe(section, section.architecture, section.top_k, D, expert, shared, num_experts)
        for section, num_experts in zip(sections, config.experts_of_layers(moes), strict=True)
    )
    dense = settings.num_layers * attention + (settings.num_layers - moes) * mlp
    return dense + of_moes + 2 * D * settings.vocab_size


def _moe(
    config: ScMoEConfig, architecture: str, top_k: int, width: int, expert: float, shared: float, num_experts: int
) -> float:
    gates = 2 if architecture == "dgmoe" else 1
    flops = gates * (2 * width * num_experts + top_k * expert)
    if architecture in _SHARED:
        # DeepSpeed's Residual MoE has two coefficients.
        merge = "cg2" if architecture == "shared_expert" else config.merge
        flops += shared + 2 * width * _COEFFICIENTS[merge]
    return flops


def _swin(settings: SwinSettings, config: ScMoEConfig) -> float:
    places = settings.moe_blocks(config.moe_every)
    experts = dict(zip(places, config.experts_of_layers(len(places)), strict=True))
    total = settings.side_of(0) ** 2 * 2.0 * settings.num_channels * settings.patch_size**2 * settings.embed_dim
    for stage in range(STAGES):
        D, side = settings.width_of(stage), settings.side_of(stage)
        window = min(settings.window_size, side) ** 2
        attention, mlp = 8.0 * D * D + 4 * window * D, 4 * D * int(settings.mlp_ratio * D)
        per_token = settings.depths[stage] * attention
        for block in range(settings.depths[stage]):
            if (stage, block) in experts:
                per_token += _moe(config, *routing_of_stage(config, stage), D, mlp, mlp, experts[stage, block])
            else:
                per_token += mlp
        if stage + 1 < STAGES:  # four tokens of width D become one of 2 D
            per_token += 4 * D * settings.width_of(stage + 1) * 2 / 4
        total += side**2 * per_token
    return total + 2 * settings.width_of(STAGES - 1) * settings.num_classes
