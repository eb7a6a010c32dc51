"""LongCat-Flash's MoE as a layer of DeepSpeed's AutoEP, which knows neither its router's names nor identity experts.

transformers' `LongcatFlashMoE` has a router (`classifier`, `e_score_correction_bias`) with an output for every expert,
identity experts included, and experts of which AutoEP takes the real ones. Rows of `gate_up_proj` that transformers
keeps for identity experts are never read, and are left behind.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.base import MoEModelPreset, TransformersTopLevelRouterLogitsAdapter
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.logits import fp32_logits
from scmoe_ds.moe.router import KeepsBias

FAMILY = "longcat_flash"
PRESET = MoEModelPreset(
    moe_layer_pattern=r"model\.layers\.\d+\.mlp",
    router_pattern="router",
    experts_pattern="experts",
    expert_storage="fused_3d",
    expert_w1="gate_up_proj",
    expert_w2="down_proj",
    expert_w3=None,
    num_experts_attr="n_routed_experts",
    top_k_attr="moe_topk",
    score_func="softmax",
    score_apply="post",
    route_norm=False,
    gate_bias=False,
    autoep_config_defaults={"load_balance_coeff": None},
    supports_expert_bias=False,
    preset_adapter=FAMILY,
    hf_model_types=(FAMILY,),
    min_transformers_version="5.0.0",
)

ADAPTER = TransformersTopLevelRouterLogitsAdapter(
    display_name="LongCat-Flash", hf_model_types=(FAMILY,), class_name_fragments=("LongcatFlash",)
)


class LongCatAutoEP(AutoEPMoELayer):
    """AutoEP's layer with real experts alone, and a router that chooses among identity experts, too.

    DeepSpeed makes it in the place of an AutoEPMoELayer. It runs as a `replace.autoep.ScheduledAutoEP`.

    Raises:
        ScMoEConfigError: a router with a bias, which transformers' own forward does not add, or weights that are to
            multiply what the experts read.
    """

    def __init__(self, spec: Any, source_module: Any, *args: Any, **kwargs: Any) -> None:
        source = source_module.router
        if source.classifier.bias is not None:
            raise ScMoEConfigError(
                f"{spec.moe_module_name}.router.classifier has a bias, which transformers does not add; set "
                '"router_bias": false in the model\'s config.json'
            )
        source.weight = source.classifier.weight  # the name by which AutoEP reads a router
        super().__init__(spec, source_module, *args, **kwargs)
        if self.score_apply != "post":
            raise ScMoEConfigError(
                f'expert_parallel.score_apply = "{self.score_apply}": LongCat weights the results of experts; remove it'
            )
        outputs = source.n_routed_experts  # identity experts included
        self.router.num_experts = self.router.gate.out_features = outputs
        self.router.__class__, self.router.gate.__class__ = LongCatRouter, Fp32Linear
        self.tokens_per_expert = torch.zeros(outputs, device=source.weight.device)

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise ScMoEConfigError(
            'identity experts run under a schedule only: call scmoe_ds.initialize, with a "scmoe" section in the JSON'
        )


class LongCatRouter(KeepsBias, TokenChoiceTopKRouter):
    """AutoEP's router; the correction bias keeps its dtype."""


class Fp32Linear(nn.Linear):
    """Logits in fp32 whatever the parameters' dtype: [T, D] → [T, E]."""

    def forward(self, input: Tensor) -> Tensor:
        return fp32_logits(input, self.weight)
