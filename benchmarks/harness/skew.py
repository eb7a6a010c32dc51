"""A gate that gives expert 0 so many times the mean load, for the tokens that a benchmark has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scmoe_ds.parallel.agreement import gather

SEARCHES, HIGHEST = 14, 40.0
TRAINED = 2.6
"""Times a new gate's weights: its logits then differ by 1.5 (standard deviation), as a trained gate's about do."""


@torch.no_grad()
def give_skew(pair: Any, skew: float, hidden: Tensor) -> None:
    """Shifts the gate's input by a constant, and searches how much expert 0 must like it. Collective.

    Args:
        pair: its gate's weights become `TRAINED` times as large, too.
        skew: rows of expert 0 over the mean of all experts; 1: the gate as it is.
        hidden: this rank's input.
    """
    layer = pair.layer
    gate = layer.deepspeed_moe.gate.wg
    gate.weight *= TRAINED
    if skew <= 1:
        return
    norm = getattr(pair, "shortcut_norm", None) or pair.blocks[-1].mlp_norm
    direction = torch.ones(gate.in_features) / gate.in_features**0.5
    norm.bias += direction
    entering: list[Tensor] = []
    hook = norm.register_forward_hook(lambda module, inputs, output: entering.append(output))
    pair(hidden)
    hook.remove()
    tokens_TD = entering[-1].reshape(-1, gate.in_features)
    logits_TE, liked_T, (low, high) = gate(tokens_TD), tokens_TD @ direction, (-HIGHEST, HIGHEST)
    for _ in range(SEARCHES):
        middle = (low + high) / 2
        shifted_TE = logits_TE.clone()
        shifted_TE[:, 0] += middle * liked_T
        chosen = shifted_TE.topk(layer.top_k, dim=1).indices.flatten().bincount(minlength=gate.out_features)
        counts_E = torch.tensor(gather(chosen.tolist())).double().sum(0)
        low, high = (low, middle) if float(counts_E[0] / counts_E.mean()) > skew else (middle, high)
    gate.weight[0] += high * direction
