"""Presets for AutoEP's registry: families of Hugging Face models that DeepSpeed 0.19.8 has none for.

A preset says where a family's MoE blocks are, what their parts are called, and how the router scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deepspeed.module_inject.auto_ep_presets import deepseek_v3, mixtral
from deepspeed.module_inject.auto_ep_presets.base import MoEModelPreset, TransformersTopLevelRouterLogitsAdapter
from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS, preset_name_for_hf_model_type

from scmoe_ds.compat import build_autoep_layers_as, register_autoep_adapter
from scmoe_ds.replace import longcat


class _GroupsAndLogits(TransformersTopLevelRouterLogitsAdapter):
    """DeepSeek-V3's groups of experts; and the model records its router's logits."""

    def resolve_group_routing(self, config: Any, model_config: Any) -> Any:
        return deepseek_v3.DeepSeekV3PresetAdapter().resolve_group_routing(config, model_config)


PRESETS: dict[str, tuple[MoEModelPreset, Any]] = {
    "glm4_moe": (
        replace(deepseek_v3.PRESET, route_norm=True, preset_adapter="glm4_moe", hf_model_types=("glm4_moe",)),
        _GroupsAndLogits(display_name="GLM-4-MoE", hf_model_types=("glm4_moe",), class_name_fragments=("Glm4Moe",)),
    ),
    "olmoe": (
        replace(
            mixtral.PRESET,
            num_experts_attr="num_experts",
            route_norm=False,
            preset_adapter="olmoe",
            hf_model_types=("olmoe",),
        ),
        TransformersTopLevelRouterLogitsAdapter(
            display_name="OLMoE", hf_model_types=("olmoe",), class_name_fragments=("Olmoe",)
        ),
    ),
    longcat.FAMILY: (longcat.PRESET, longcat.ADAPTER),
}
"""Name to preset and adapter. A later DeepSpeed's own preset of a family comes first."""


def offer_presets() -> None:
    """Adds the presets to AutoEP's registry; harmless when called again."""
    for name, (preset, adapter) in PRESETS.items():
        if preset_name_for_hf_model_type(preset.hf_model_types[0]) is None:
            register_autoep_adapter(preset.preset_adapter, adapter)
            PRESET_MODELS[name] = preset
            if name == longcat.FAMILY:
                build_autoep_layers_as(name, longcat.LongCatAutoEP)


def is_ours(name: str) -> bool:
    """Whether AutoEP's preset of this name is one of these."""
    return name in PRESETS and PRESET_MODELS.get(name) is PRESETS[name][0]
