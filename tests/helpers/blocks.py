"""A block that somebody else might have written."""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm, eight wide, with the names of LLaMA; the feed-forward may be a MoE of DeepSpeed's."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention, self.mlp = nn.Linear(8, 8), feed_forward

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.input_layernorm(hidden))
        output = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + (output[0] if isinstance(output, tuple) else output)
