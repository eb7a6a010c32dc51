"""ScMoE in a trained Hugging Face model: what a converted decoder layer has more than before.

This file needs torch and transformers alone.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN


class SharedExpert(nn.Module):
    """A SwiGLU MLP that every token passes: [..., D] → [..., D].

    Args:
        hidden_size: D.
        width: of its inner activation, as that of a routed expert.
        activation: transformers' name of the experts' activation.
    """

    def __init__(self, hidden_size: int, width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        output: torch.Tensor = self.down_proj(inner)
        return output


class ShortcutParts(nn.Module):
    """Parameters that a decoder layer has more when its MoE is a ScMoE; the layer's child `shortcut`.

    Args:
        norm: what the tapped value goes through; None: the norm through which the model itself reads it.
        shared_expert: of a source without one; None: the source's own, or none at all.
        coefficient: [..., D] → the logits of the merge: Linear(D, 1) for cg1, Linear(D, 2) for cg2, of which row 0
            weighs the routed experts; None: both outputs are added.
    """

    def __init__(
        self,
        norm: nn.Module | None = None,
        shared_expert: SharedExpert | None = None,
        coefficient: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.shared_expert, self.coefficient = norm, shared_expert, coefficient
