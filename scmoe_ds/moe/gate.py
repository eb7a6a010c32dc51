"""`route`: which expert takes which token, and with what weight; equal to DeepSpeed's gate, bit for bit.

DeepSpeed's own functions take a mask for k = 1 only. They count masked tokens in the balancing loss and the capacity,
refuse fewer tokens than `min_capacity`, and do not return the expert of a dropped choice. Here masked tokens are left
out before anything is computed. So the result depends on the other tokens alone.

Shape suffixes: T tokens, U used tokens, D hidden, E experts, K routed experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from scmoe_ds.comm.counts import largest
from scmoe_ds.config.names import FORMER_GATE_SOFTMAX, GateSoftmax
from scmoe_ds.moe.checks import check_tokens


@dataclass(frozen=True)
class Routing:
    """The gate's decision.

    Attributes:
        expert_KT: int64 global expert id, -1 where the capacity limit dropped the choice or the token is masked.
        location_KT: int64 number of the token among its expert's tokens, from 0.
        weight_KT: fp32 gate value, 0 where dropped or masked; differentiable.
        capacity: most tokens that an expert takes (int, or a scalar tensor if it follows from the counts).
        l_aux: load-balancing loss, scalar fp32, differentiable.
        exp_counts: [E] int64 tokens per expert before drops.
        used_T: bool, the tokens that are not masked; None: all of them.
    """

    expert_KT: Tensor
    location_KT: Tensor
    weight_KT: Tensor
    capacity: int | Tensor
    l_aux: Tensor
    exp_counts: Tensor
    used_T: Tensor | None = None


def route(
    gate: TopKGate,
    tokens_TD: Tensor,
    used_token: Tensor | None = None,
    exclude_T: Tensor | None = None,
    softmax: GateSoftmax = "deepspeed",
    group: dist.ProcessGroup | None = None,
) -> Routing:
    """Routes every token to its top-k experts (fp32 throughout).

    Args:
        gate: holds weight, k, capacity factors, noise policy and drop policy.
        tokens_TD: any floating dtype; any number of tokens, also none.
        used_token: T elements of any shape and dtype, zero for padding. A token of padding is routed to no expert, and
            does not count for loss, counts and capacity. The host waits for a mask on a GPU.
        exclude_T: an expert that each token may not choose, -1 for none (DGMoE's second choice, paper eq. 23;
            top-1 only).
        softmax: among which experts a token's weights are normalised, see `_weights`.
        group: agree on the largest capacity of these ranks (padded buffers need it; one blocking all-reduce).

    Raises:
        ValueError: a mask or choice that is none, or of another number of tokens; or `exclude_T` with k > 1.
    """
    if gate.k > 1 and exclude_T is not None:
        raise ValueError(f"exclude_T is defined for k = 1, not k = {gate.k}")
    check_tokens("used_token", used_token, len(tokens_TD))
    check_tokens("exclude", exclude_T, len(tokens_TD), integer=True)
    if used_token is None:
        routing = _route_all(gate, tokens_TD, exclude_T, softmax)
    else:
        used_T = used_token.reshape(-1) != 0
        index_U, used_T = used_T.nonzero().squeeze(1).to(tokens_TD.device), used_T.to(tokens_TD.device)
        exclude_U = None if exclude_T is None else exclude_T.index_select(0, index_U)
        routing = _route_all(gate, tokens_TD.index_select(0, index_U), exclude_U, softmax)
        routing = _insert_masked(routing, index_U, used_T)
    return _agreed(routing, group)


def _route_all(gate: TopKGate, tokens_TD: Tensor, exclude_T: Tensor | None, softmax: GateSoftmax) -> Routing:
    logits_TE = _logits(gate, tokens_TD)
    T, E = logits_TE.shape
    if T == 0:  # a rank without tokens still takes part in the exchange
        none_KT, counts_E = logits_TE.new_zeros(gate.k, 0), logits_TE.new_zeros(E, dtype=torch.int64)
        return Routing(none_KT.long(), none_KT.long(), none_KT, 0, logits_TE.sum(), counts_E)
    probability_TE = F.softmax(logits_TE, dim=1)
    chosen_KT = _choose(gate, logits_TE, probability_TE, exclude_T)
    chosen_TE = torch.zeros_like(probability_TE, dtype=torch.bool).scatter_(1, chosen_KT.t(), True)
    counts_E = chosen_TE.sum(0)
    # For k = 2 DeepSpeed balances the first choices alone.
    l_aux = _balancing_loss(gate.k, probability_TE, F.one_hot(chosen_KT[0], E) if gate.k == 2 else chosen_TE)
    limit = min(capacity_of(gate, T), T) if gate.drop_tokens else None
    kept_KT, location_KT = _keep(gate, probability_TE, chosen_KT, chosen_TE, limit)
    weight_KT = _weights(softmax, logits_TE, probability_TE, chosen_KT, kept_KT)
    expert_KT = torch.where(kept_KT, chosen_KT, -1)
    return Routing(expert_KT, location_KT, weight_KT, counts_E.max() if limit is None else limit, l_aux, counts_E)


def _logits(gate: TopKGate, tokens_TD: Tensor) -> Tensor:
    tokens_TD = tokens_TD.float()
    if gate.noisy_gate_policy == "Jitter" and gate.training:
        tokens_TD = sharded_moe.multiplicative_jitter(tokens_TD, device=tokens_TD.device)
    with torch.autocast(tokens_TD.device.type, enabled=False):  # fp32 whatever surrounds the layer
        return F.linear(tokens_TD, gate.wg.weight.float())


@torch.no_grad()
def _choose(gate: TopKGate, logits_TE: Tensor, probability_TE: Tensor, exclude_T: Tensor | None) -> Tensor:
    """[K, T] the experts that each token chooses, first choices first."""
    if gate.k > 2:
        return probability_TE.topk(gate.k, dim=1).indices.t().contiguous()
    experts_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
    score_TE = probability_TE
    if gate.noisy_gate_policy == "RSample" and gate.training and gate.k == 1:
        score_TE = logits_TE + sharded_moe.gumbel_rsample(logits_TE.shape, device=logits_TE.device)
    if exclude_T is not None:
        # The excluded expert cannot be chosen, but stays in the softmax: G(H) is the same function for both layers.
        score_TE = score_TE.masked_fill(exclude_T.unsqueeze(1) == experts_E, float("-inf"))
    first_T = score_TE.argmax(1)
    if gate.k == 1:
        return first_T.unsqueeze(0)
    score_TE = logits_TE
    if gate.top2_2nd_expert_sampling:
        score_TE = logits_TE + sharded_moe.gumbel_rsample(logits_TE.shape, device=logits_TE.device)
    second_T = score_TE.masked_fill(first_T.unsqueeze(1) == experts_E, float("-inf")).argmax(1)
    return torch.stack([first_T, second_T])


def _balancing_loss(k: int, probability_TE: Tensor, counted_TE: Tensor) -> Tensor:
    """Mean probability times share of the tokens, summed over experts; 1 where both are even."""
    E = probability_TE.shape[1]
    balance_E = probability_TE.mean(0) * counted_TE.float().mean(0)
    if k == 1:
        return balance_E.sum() * E
    return balance_E.mean() * E * E / (k if k > 2 else 1)


def capacity_of(gate: TopKGate, tokens: int) -> int:
    """DeepSpeed's capacity for a number of tokens. It follows from shapes: no host waits for a GPU."""
    factor = gate.capacity_factor if gate.training else gate.eval_capacity_factor
    return capacity(tokens, gate.wg.out_features, factor * gate.k, gate.min_capacity)


def capacity(tokens: int, experts: int, factor: float, least: int) -> int:
    """Most tokens that an expert takes, of `factor` tokens per token; rounded in fp32, as DeepSpeed does."""
    return max(int(torch.ceil(tokens / experts * torch.tensor(factor))), int(least))


@torch.no_grad()
def dropped_choices(gate: TopKGate, exp_counts: Tensor) -> Tensor:
    """How many choices the capacity limit dropped in a training pass of this rank (int64 scalar on its device).

    Args:
        exp_counts: [E] int64 tokens per expert before drops.
    """
    if not gate.drop_tokens:
        return exp_counts.new_zeros(())
    # As `capacity`, from the counts: the host does not wait for them.
    per_expert = (exp_counts.sum().double() / (gate.k * len(exp_counts))).float()
    limit = (per_expert * (gate.capacity_factor * gate.k)).ceil().clamp(min=int(gate.min_capacity)).long()
    return (exp_counts - limit).clamp(min=0).sum()


@torch.no_grad()
def _keep(
    gate: TopKGate, probability_TE: Tensor, chosen_KT: Tensor, chosen_TE: Tensor, limit: int | None
) -> tuple[Tensor, Tensor]:
    """[K, T] which choices are kept, and the number of each kept one among its expert's tokens.

    If an expert is chosen more often than `limit`, then k = 1 keeps random tokens (`use_rts`), and k > 2 the most
    probable ones. k = 2 keeps first choices before second ones, each in the order of the tokens. None: no limit.
    """
    K, (T, E) = len(chosen_KT), probability_TE.shape
    # Drawn without a limit too, as in DeepSpeed: the next random numbers must not depend on `drop_tokens`.
    random_TE = torch.rand(T, E, device=chosen_KT.device) if K == 1 and gate.use_rts else None
    if K == 2:
        arrived_XE = F.one_hot(chosen_KT.flatten(), E).cumsum(0) - 1
        location_KT = arrived_XE.gather(1, chosen_KT.reshape(-1, 1)).view(K, T)
        kept_KT = torch.ones_like(chosen_KT, dtype=torch.bool) if limit is None else location_KT < limit
        return kept_KT, location_KT * kept_KT
    kept_TE = chosen_TE
    if limit is not None:
        order_TE = probability_TE if K > 2 else random_TE
        priority_TE = chosen_TE.long() if order_TE is None else order_TE.masked_fill(~chosen_TE, -1.0)
        best_CE = priority_TE.topk(limit, dim=0, sorted=False).indices
        kept_TE = chosen_TE & torch.zeros_like(chosen_TE).scatter_(0, best_CE, True)
    kept_KT = kept_TE.gather(1, chosen_KT.t()).t()
    location_KT = (kept_TE.cumsum(0) - 1).gather(1, chosen_KT.t()).t()
    return kept_KT, location_KT * kept_KT


def _weights(
    softmax: GateSoftmax, logits_TE: Tensor, probability_TE: Tensor, chosen_KT: Tensor, kept_KT: Tensor
) -> Tensor:
    """[K, T] gate values. `softmax` names the experts among which a token's probabilities add up to 1.

    "all"        all experts. The weights of the chosen ones add up to less.
    "chosen"     the chosen ones (paper eq. 2-3), dropped ones too. The weights of the kept ones add up to less.
    "kept"       the chosen ones that the capacity limit has not dropped.
    "deepspeed"  as DeepSpeed: "all" for k = 1, "kept" for more. There a sum below 1.2e-7 counts as 1.2e-7.
    """
    softmax = FORMER_GATE_SOFTMAX.get(softmax, softmax)
    if softmax in ("chosen", "kept"):
        logits_KT = logits_TE.gather(1, chosen_KT.t()).t()
        if softmax == "kept":
            # Not -inf: for a token without kept choices the softmax and its gradient would be 0/0.
            logits_KT = logits_KT.masked_fill(~kept_KT, torch.finfo(logits_KT.dtype).min)
        return F.softmax(logits_KT, dim=0) * kept_KT
    weight_KT = probability_TE.gather(1, chosen_KT.t()).t() * kept_KT
    if softmax == "all" or len(chosen_KT) == 1:
        return weight_KT
    total_T = torch.zeros_like(probability_TE).scatter(1, chosen_KT.t(), weight_KT.t()).sum(1)  # in DeepSpeed's order
    return weight_KT / total_T.clamp(min=torch.finfo(total_T.dtype).eps)


def _insert_masked(routing: Routing, index_U: Tensor, used_T: Tensor) -> Routing:
    """From a routing of the used tokens to one of all tokens."""
    shape = (len(routing.expert_KT), len(used_T))
    expert_KT = routing.expert_KT.new_full(shape, -1).index_copy(1, index_U, routing.expert_KT)
    location_KT = routing.location_KT.new_zeros(shape).index_copy(1, index_U, routing.location_KT)
    weight_KT = routing.weight_KT.new_zeros(shape).index_copy(1, index_U, routing.weight_KT)
    return Routing(expert_KT, location_KT, weight_KT, routing.capacity, routing.l_aux, routing.exp_counts, used_T)


def _agreed(routing: Routing, group: dist.ProcessGroup | None) -> Routing:
    if group is None or dist.get_world_size(group) == 1:
        return routing
    own = routing.exp_counts.new_empty(()).fill_(routing.capacity)  # `tensor(…, device=…)` would make the host wait
    return replace(routing, capacity=largest(own, group))
