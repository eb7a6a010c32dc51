"""How shared and routed outputs become one: direct addition, or a learned coefficient (CG-1, CG-2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.config.names import Merge

OUTPUTS: dict[str, int] = {"add": 0, "cg1": 1, "cg2": 2}
"""Rows of the coefficient's weight, per merge."""


def coefficient_network(merge: Merge, hidden_size: int) -> nn.Linear | None:
    """The network of a merge: None, Linear(hidden, 1) or Linear(hidden, 2) as DeepSpeed's Residual MoE has it."""
    return nn.Linear(hidden_size, OUTPUTS[merge]) if OUTPUTS[merge] else None


def merge_outputs(
    merge: Merge, shared: Tensor, routed: Tensor, hidden_states: Tensor, coefficient: nn.Linear | None
) -> Tensor:
    """Merges the shared expert's and the routed experts' outputs.

    The paper's coef[0] of CG-2 weighs the shared expert; DeepSpeed's Residual MoE has it the other way round. The
    weights here are in DeepSpeed's order (row 0 weighs the routed experts), so that its checkpoints load unchanged.

    Args:
        shared, routed: [..., D].
        hidden_states: [..., D], the current layer's normalised input, which the coefficient reads.
        coefficient: `coefficient_network(merge, D)`.
    """
    shared_weight, routed_weight = merge_weights(merge, hidden_states, coefficient)
    return weighted(routed, routed_weight) + weighted(shared, shared_weight)  # eq. 6 and 7


def merge_weights(
    merge: Merge, hidden_states: Tensor, coefficient: nn.Linear | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the shared and of the routed output, [..., 1]; None: 1. Arguments as for `merge_outputs`."""
    if coefficient is None:
        return None, None
    logits = coefficient(hidden_states)
    if merge == "cg1":
        return torch.sigmoid(logits), None  # eq. 14-15
    coef = F.softmax(logits, dim=-1)
    return coef[..., 1:], coef[..., 0:1]  # eq. 16-17


def weighted(output: Tensor, weight: Tensor | None) -> Tensor:
    """An output times its weight of `merge_weights`."""
    return output if weight is None else output * weight
