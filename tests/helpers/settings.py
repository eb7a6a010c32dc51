"""Shapes of small models for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scmoe_ds.models.layers import GPTSettings

GPT2 = GPTSettings(4, 32, 4, 384, 48)
LLAMA_STYLE: dict[str, Any] = dict(
    num_key_value_heads=2,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding="rope",
    add_bias_linear=False,
    tie_embeddings=False,
)
LLAMA = replace(GPT2, **LLAMA_STYLE)
