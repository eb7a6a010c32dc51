"""Which model a file of measurements is of, as far as similarity and times both know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from scmoe_ds.models.gpt import GPT

Identity = Mapping[str, Any]
SIZES = {
    "num_layers": ("depths", "num_layers", "num_hidden_layers"),
    "hidden_size": ("embed_dim", "hidden_size"),
    "num_attention_heads": ("num_attention_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
}
"""Size to the attributes that may hold it: of this package's settings or of a Hugging Face config. A pyramid's come
first: transformers' SwinV2 also has the width of its last stage and the number of its stages."""


def identity(model: nn.Module) -> dict[str, Any]:
    """Sizes of a model, as JSON values; what it does not say is left out. Weights, and whether the MoE is a ScMoE, are
    no part of it: times do not depend on weights, and similarity is measured before there is a shortcut."""
    settings = getattr(model, "settings", None) or getattr(model, "config", None)
    found: dict[str, Any] = {}
    for name, attributes in SIZES.items():
        values = (getattr(settings, attribute, None) for attribute in attributes)
        value = next((each for each in values if isinstance(each, (int, list, tuple))), None)
        if value is not None:
            found[name] = value if isinstance(value, int) else list(value)
    if isinstance(model, GPT):
        config, layers = model.config, model.settings.num_layers
        found["moe_blocks"] = list(range(config.moe_every - 1, layers, config.moe_every))
        own = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        found |= {width: value for width in own if (value := getattr(config, width)) is not None}
        found["num_experts"] = config.experts_of_layers(config.moe_layers(layers))
    return found


def differences(one: Identity, other: Identity) -> list[str]:
    """What two models that are the same cannot differ in: "hidden_size 64 and 128". Compares what both say."""
    both = [name for name in one if name in other]
    return [f"{name} {one[name]} and {other[name]}" for name in both if one[name] != other[name]]
