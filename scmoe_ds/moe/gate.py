"""Routing: DeepSpeed's gate functions, with their result as a typed value.

Shape suffixes: T tokens, D hidden, E experts, K routed experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which expert takes which token, and with what weight.

    Attributes:
        expert_KT: int64 global expert id, -1 where the capacity limit dropped the choice.
        location_KT: int64 place of the token among its expert's tokens, from 0.
        weight_KT: fp32 gate value, 0 where dropped; differentiable.
        capacity: most tokens that an expert takes (int, or a scalar tensor where it follows from the counts).
        l_aux: load-balancing loss, scalar fp32, differentiable.
        exp_counts: [E] int64 tokens per expert before drops.
    """

    expert_KT: Tensor
    location_KT: Tensor
    weight_KT: Tensor
    capacity: Tensor
    l_aux: Tensor
    exp_counts: Tensor


def route(
    gate: TopKGate,
    tokens_TD: Tensor,
    used_token: Tensor | None = None,
    exclude_T: Tensor | None = None,
    softmax: Literal["before_topk", "after_topk"] = "before_topk",
    common_capacity: bool = False,
) -> Routing:
    """Routes every token with DeepSpeed's own top-1, top-2 or top-k gating (fp32 throughout).

    Args:
        gate: holds weight, k, capacity factors, noise policy and drop policy.
        tokens_TD: any floating dtype.
        used_token: [T] mask of real tokens, as in DeepSpeed (top-1 only).
        exclude_T: an expert that each token may not choose, -1 for none (DGMoE's second choice, paper eq. 23;
            top-1 only).
        softmax: "before_topk" weighs by the probability among all experts (DeepSpeed, Tutel); "after_topk" by the
            softmax over the chosen ones (paper eq. 2-3), which for k = 1 is the constant 1.
        common_capacity: without drops, agree on the largest capacity of all ranks (padded buffers need it;
            one blocking all-reduce).

    Raises:
        ValueError: `used_token` or `exclude_T` with k > 1.
    """
    if gate.k > 1 and (used_token is not None or exclude_T is not None):
        raise ValueError(f"used_token and exclude_T are defined for k = 1, not k = {gate.k}")
    logits_TE = _logits(gate, tokens_TD)
    if tokens_TD.shape[0] == 0:
        return _nothing(gate.k, logits_TE)
    allowed_TE = logits_TE
    if exclude_T is not None:
        experts_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
        allowed_TE = logits_TE.masked_fill(exclude_T.unsqueeze(1) == experts_E, float("-inf"))
    group = gate.ep_group if common_capacity else None
    l_aux, capacity, _, expert_KT, location_KT, weight_KT, exp_counts = _gating(gate, allowed_TE, used_token, group)
    expert_KT, location_KT = expert_KT.long(), location_KT.long()
    if exclude_T is not None:
        # The excluded expert is out of the choice, not out of the softmax: G(H) is the same function for both layers.
        weight_KT, l_aux = _reweigh(logits_TE, expert_KT, exp_counts)
    if softmax == "after_topk":
        weight_KT = weight_KT / weight_KT.sum(0, keepdim=True).clamp(min=torch.finfo(weight_KT.dtype).tiny)
    return Routing(expert_KT, location_KT, weight_KT, capacity, l_aux, exp_counts)


def _nothing(k: int, logits_TE: Tensor) -> Routing:
    """The routing of no tokens: a rank without any still takes part in the exchange."""
    choices_KT = logits_TE.new_zeros(k, 0)
    counts_E = logits_TE.new_zeros(logits_TE.shape[1], dtype=torch.int64)
    capacity = torch.zeros((), dtype=torch.int64)
    return Routing(choices_KT.long(), choices_KT.long(), choices_KT, capacity, logits_TE.sum(), counts_E)


def _logits(gate: TopKGate, tokens_TD: Tensor) -> Tensor:
    tokens_TD = tokens_TD.float()
    if gate.noisy_gate_policy == "Jitter" and gate.training:
        tokens_TD = sharded_moe.multiplicative_jitter(tokens_TD, device=tokens_TD.device)
    with torch.autocast(tokens_TD.device.type, enabled=False):  # fp32 whatever surrounds the layer
        return F.linear(tokens_TD, gate.wg.weight.float())


def _gating(gate: TopKGate, logits_TE: Tensor, used_token: Tensor | None, group: object) -> tuple[Tensor, ...]:
    """What `TopKGate.forward` does after its logits, with the group as an argument."""
    factor = gate.capacity_factor if gate.training else gate.eval_capacity_factor
    noise = gate.noisy_gate_policy if gate.training else None
    if gate.k == 1:
        return sharded_moe.top1gating(logits_TE, factor, gate.min_capacity, used_token, noise, gate.drop_tokens,
                                      gate.use_rts, group, sparse_routes=True)  # fmt: skip
    if gate.k == 2:
        return sharded_moe.top2gating(logits_TE, factor, gate.min_capacity, gate.drop_tokens, group,
                                      gate.top2_2nd_expert_sampling, sparse_routes=True)  # fmt: skip
    return sharded_moe.topkgating(logits_TE, gate.k, factor, gate.min_capacity, gate.drop_tokens, group,
                                  sparse_routes=True)  # fmt: skip


def _reweigh(logits_TE: Tensor, expert_KT: Tensor, exp_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 weight and load-balancing loss from the softmax over all experts, given the choice."""
    gates_TE = F.softmax(logits_TE, dim=1)
    kept_KT = expert_KT >= 0
    weight_KT = gates_TE.gather(1, expert_KT.clamp(min=0).t()).t() * kept_KT
    share_E = exp_counts / logits_TE.shape[0]
    return weight_KT, (gates_TE.mean(0) * share_E).sum() * logits_TE.shape[1]
