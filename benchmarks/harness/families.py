"""Models of Hugging Face's MoE families, cut in width and batch only, with AutoEP's layers in their blocks.

Number of experts, experts per token, shared experts and the proportions of the published model are kept: a width of a
quarter has a quarter of every width. Heads keep their size, and there are fewer of them. A model here is a few of
transformers' own decoder layers, without embedding and head, and with next to no vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.harness.autoep_parts import autoep_layers
from scmoe_ds.compat_transformers import accept_names_of_recorders
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.replace import longcat
from scmoe_ds.replace.adapted_parts import prepare_parts
from scmoe_ds.replace.presets import offer_presets

SEQUENCE = 128
SLOW = 0.3
"""Share of the all-to-alls from which on a link counts as slow. On faster ones gloo's own processor time would be the
larger part of a transfer, unless each row has more computation: the shapes there are wider, and have fewer tokens."""


@dataclass(frozen=True)
class Cut:
    """How much smaller a model is than the published one.

    Attributes:
        width: what widths and heads are divided by.
        sequences: of `SEQUENCE` tokens in one rank's batch.
    """

    width: int
    sequences: int

    @property
    def tokens(self) -> int:
        """Of one rank."""
        return self.sequences * SEQUENCE


@dataclass(frozen=True)
class Family:
    """One published model.

    Attributes:
        model_type: transformers' name of the family.
        name: of the published model.
        widths: transformers' names of its widths, as published; all of them are divided by the cut.
        counts: everything else that differs from transformers' defaults; heads are divided by the cut.
        heads: names of the numbers of heads, as published.
        slow, fast: how it is cut on slow links, and on fast ones.
        blocks: decoder layers with an MoE.
    """

    model_type: str
    name: str
    widths: Mapping[str, int]
    heads: Mapping[str, int]
    counts: Mapping[str, Any]
    slow: Cut
    fast: Cut
    blocks: int = 2

    def cut(self, share: float) -> Cut:
        """How it is cut where the all-to-alls take this share of AutoEP's layers."""
        return self.slow if share >= SLOW else self.fast

    def config(self, cut: Cut) -> Any:
        """Its configuration, cut."""
        sizes = {name: max(value // cut.width, 1) for name, value in {**self.widths, **self.heads}.items()}
        layers = "num_layers" if self.model_type == longcat.FAMILY else "num_hidden_layers"
        plain = {"vocab_size": 32, "pad_token_id": None, layers: self.blocks, "use_cache": False}
        return CONFIG_MAPPING[self.model_type](**plain, **sizes, **self.counts)


FAMILIES = {
    "qwen3": Family(
        "qwen3_moe",
        "Qwen3-30B-A3B",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
        {"num_attention_heads": 32, "num_key_value_heads": 4},
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128},
        slow=Cut(8, 3),
        fast=Cut(4, 2),
    ),
    "deepseek": Family(
        "deepseek_v2",
        "DeepSeek-V2-Lite",
        {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "kv_lora_rank": 512},
        {"num_attention_heads": 16, "num_key_value_heads": 16},
        {
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        slow=Cut(8, 3),
        fast=Cut(4, 2),
    ),
    "mixtral": Family(
        "mixtral",
        "Mixtral-8x7B",
        {"hidden_size": 4096, "intermediate_size": 14336},
        {"num_attention_heads": 32, "num_key_value_heads": 8},
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 128},
        slow=Cut(16, 3),
        fast=Cut(8, 1),
    ),
    "longcat": Family(
        "longcat_flash",
        "LongCat-Flash",
        {
            "hidden_size": 6144,
            "ffn_hidden_size": 12288,
            "expert_ffn_hidden_size": 2048,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
        },
        {"num_attention_heads": 64},
        {
            "n_routed_experts": 512,
            "zero_expert_num": 256,
            "moe_topk": 12,
            "routed_scaling_factor": 6.0,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        slow=Cut(32, 4),
        fast=Cut(16, 2),
        blocks=1,
    ),
}


def build_model(family: Family, cut: Cut, section: ScMoEConfig) -> nn.Module:
    """The family's model, the same on every rank, with AutoEP's layers in it as DeepSpeed's engine puts them there, and
    with what the section's ScMoE has more."""
    accept_names_of_recorders()
    offer_presets()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family.config(cut), attn_implementation="sdpa")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    expert_parallel = {"enabled": True, "autoep_size": ranks}
    prepare_parts(model, section, expert_parallel)
    auto_ep = AutoEP(model, parse_autoep_config(expert_parallel))
    auto_ep.replace_moe_layers(auto_ep.ep_parser(), ranks, rank)
    for layer in autoep_layers(model):
        layer.set_deepspeed_parallelism()
        if isinstance(layer, longcat.LongCatAutoEP):
            layer.__class__ = AutoEPWithIdentity
    return cast(nn.Module, model.train())


class AutoEPWithIdentity(longcat.LongCatAutoEP):
    """AutoEP's forward pass, from its own parts, for a router that chooses among identity experts, too.

    AutoEP has none of these. The baseline is what it would do with them: no row of theirs travels, as in our layers.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] → the same."""
        tokens_TD, K = hidden_states.reshape(-1, self.hidden_size), self.top_k
        weight_TK, expert_TK, counts_E = self.router(tokens_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        real_E = counts_E[: self.num_experts]
        choice_R = expert_TK.flatten().argsort(stable=True)[: int(real_E.sum())]
        how = self.num_experts, self.ep_size, self.num_local_experts, self.ep_group
        plan = auto_ep_layer.compute_split_plan(expert_TK, *how, num_tokens_per_expert=real_E)
        rows_RD = tokens_TD[choice_R // K]
        rows_SD = auto_ep_layer._AllToAllV.apply(self.ep_group, rows_RD, plan.input_splits, plan.output_splits)
        rows_SD, *back, rows = auto_ep_layer.permute_by_local_expert(rows_SD, plan.local_counts_by_source)
        rows_SD = auto_ep_layer.unpermute_by_local_expert(self.experts(rows_SD, back[1]), back[0], rows)
        rows_RD = auto_ep_layer._AllToAllV.apply(self.ep_group, rows_SD, plan.output_splits, plan.input_splits)
        shape = (*hidden_states.shape,)
        output = auto_ep_layer.combine_from_routed(
            rows_RD, weight_TK, choice_R, K, self.score_apply, self.combine_impl, shape
        )
        identity_T1 = weight_TK.masked_fill(expert_TK < self.num_experts, 0.0).sum(1, keepdim=True)
        return cast(Tensor, output + (identity_T1 * tokens_TD).view(shape))


def skew_router(model: nn.Module, hidden: Tensor, skew: float) -> dict[str, float]:
    """Makes the first experts of every layer busier: the busiest has `skew` times the tokens of the mean. Collective.

    A bias that falls from the first expert to the last is added to the scores for the choice, as DeepSeek-V3's is; the
    weights stay as they are. Experts are held in order, so the first rank gets more rows than the others.

    Args:
        hidden: [B, S, D] what the first block reads.
        skew: 1: the router stays as it is.

    Returns:
        the loads as they are now, of the busiest expert and of the busiest rank over the mean.
    """
    layers = autoep_layers(model)
    hooks = [each.router.register_forward_pre_hook(partial(_skew_by, skew)) for each in layers if skew > 1]
    with torch.no_grad():
        for _ in range(2):  # biases are found in the first pass
            for layer in layers:
                layer.tokens_per_expert.zero_()
            model.get_submodule("model")(inputs_embeds=hidden, use_cache=False)
            for hook in hooks:
                hook.remove()
    found = [_over_all(layer.tokens_per_expert) for layer in layers]
    by_rank = [counts_E.view(dist.get_world_size(), -1).sum(1) for counts_E in found]
    return {
        "busiest_expert_over_mean": sum(float(each.max() / each.mean()) for each in found) / len(found),
        "busiest_rank_over_mean": sum(float(each.max() / each.mean()) for each in by_rank) / len(found),
    }


def _over_all(counts_E: Tensor) -> Tensor:
    total_E = counts_E.float()
    dist.all_reduce(total_E)
    return total_E


def _skew_by(skew: float, router: Any, args: tuple[Any, ...]) -> None:
    score_TE = router.gate(args[0]).float().softmax(1)
    fall_E = score_TE.std() * torch.linspace(0, -1, score_TE.shape[1])

    def reached(strength: float) -> float:
        chosen_TK = (score_TE + strength * fall_E).topk(router.top_k).indices
        counts_E = _over_all(torch.bincount(chosen_TK.flatten(), minlength=score_TE.shape[1]))
        return float(counts_E.max() / counts_E.mean())

    low, high = 0.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < skew else (low, middle)
    del router.e_score_correction_bias
    router.register_buffer("e_score_correction_bias", high * fall_E)
