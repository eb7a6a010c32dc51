"""Identity experts: E(x) = x (LongCat-Flash calls them zero-computation experts). No row of theirs travels.

A router with more outputs than the layer has experts means the last ones as identity experts. A token's choices among
them take no row. The sum of their weights stays with the token, which is added at the end with this weight:

    output = Σ_real weight · E(x)  +  (Σ_identity weight) · x

Shape suffixes: T tokens, D hidden, E experts (real ones), K routed experts per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from scmoe_ds.moe.gate import Routing


def without_identity_rows(routing: Routing, num_experts: int) -> Routing:
    """A routing whose choices of identity experts take no row; the same one if the router has none.

    Args:
        routing: over all outputs of the router. Choices that are kept lie by expert, those of identity experts last.
        num_experts: the real ones, which come first.

    Returns:
        `identity_weight_T` set; `weight_KT` is 0 and `choices.kept_KT` False for identity experts; `choices.rows_E` has
        the real experts alone. `exp_counts` goes on to count all.
    """
    choices = routing.choices
    if len(choices.counts_E) == num_experts:
        return routing
    is_real_KT = choices.expert_KT < num_experts
    kept_KT = is_real_KT if choices.kept_KT is None else is_real_KT & choices.kept_KT
    real = replace(
        choices,
        expert_KT=choices.expert_KT.clamp(max=num_experts - 1),
        kept_KT=kept_KT,
        rows_E=choices.rows_E[:num_experts],
    )
    # Of dropped and masked choices the weight is 0 already.
    identity_weight_T = routing.weight_KT.masked_fill(is_real_KT, 0.0).sum(0)
    weight_KT = routing.weight_KT.masked_fill(~is_real_KT, 0.0)
    return replace(routing, choices=real, weight_KT=weight_KT, identity_weight_T=identity_weight_T)


def add_identity(output_TD: Tensor, tokens_TD: Tensor, weight_T: Tensor) -> Tensor:
    """[T, D] output + weight · tokens, in the weights' fp32 or wider, and rounded once to the output's dtype."""
    wide_TD = output_TD.to(torch.promote_types(output_TD.dtype, weight_T.dtype))
    return torch.addcmul(wide_TD, tokens_TD, weight_T.unsqueeze(1)).to(output_TD.dtype)
