"""The four language models of the paper's table 8, as Megatron flags and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One column of table 8.

    Attributes:
        arguments: values of the command-line flags (underscores for dashes).
        num_experts, moe_every: what the "scmoe" section says for it.
        paper_parameters: the paper's count.
    """

    arguments: dict[str, Any]
    num_experts: int
    moe_every: int
    paper_parameters: float


def _gpt(layers: int, hidden: int, heads: int, sequence: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "seq_length": sequence,
        "max_position_embeddings": sequence,
    }


_LLAMA = {
    "num_key_value_heads": 4,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}

PRESETS: dict[str, Preset] = {
    "gpt2-moe-small": Preset(_gpt(12, 768, 12, 1024), 8, 2, 323e6),
    "gpt2-moe-medium": Preset(_gpt(24, 1024, 16, 2048), 16, 2, 1.7e9),
    "gpt3-moe-xl": Preset(_gpt(24, 2048, 32, 2048), 8, 2, 4.1e9),
    "llama2-moe": Preset(_gpt(24, 2048, 16, 2048) | _LLAMA, 8, 1, 6.7e9),
}
