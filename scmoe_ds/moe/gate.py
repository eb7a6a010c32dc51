"""`route`: which expert takes which token, and with what weight.

A gate without a router of another kind (scmoe_ds.moe.router) is equal to DeepSpeed's, bit for bit on a CPU.

DeepSpeed's own functions take a mask for k = 1 only. They count masked tokens in the balancing loss and the capacity,
refuse fewer tokens than `min_capacity`, and do not return the expert of a dropped choice. Here the result depends on
the tokens that are not masked alone. The host waits for nothing that a GPU computes.

Shape suffixes: T tokens, D hidden, E experts, K routed experts per token, C capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from scmoe_ds.comm.counts import largest
from scmoe_ds.config.names import FORMER_GATE_SOFTMAX, GateSoftmax
from scmoe_ds.moe.capacity import capacity_of
from scmoe_ds.moe.checks import check_tokens
from scmoe_ds.moe.choices import Choices, choose, draw, keep
from scmoe_ds.moe.experts import to_device
from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.moe.logits import fp32_logits
from scmoe_ds.moe.order import Order
from scmoe_ds.moe.router import RouterGate, choose_by_score, score, shares, weigh
from scmoe_ds.moe.top1 import Top1Kernels, choose_top1

TOLERANT = 2
"""Of `used_token`: a token that tolerates less precision."""


@dataclass(frozen=True)
class Routing:
    """The gate's decision.

    Attributes:
        choices: which expert takes which token.
        weight_KT: fp32 gate value, 0 where dropped or masked; differentiable.
        capacity: most tokens that an expert takes (int, or a scalar tensor if it follows from the counts).
        l_aux: load-balancing loss, scalar fp32, differentiable.
        used_T: bool, the tokens that are not masked; None: all of them.
        identity_weight_T: fp32 sum of the weights of the identity experts that a token chose, differentiable; None: the
            layer has none (moe/identity.py).
        score_KT: fp32 probability or score of each choice before any renormalisation, without gradient; None: nobody
            asked for it (`facts` of `route`).
        tolerant_T: bool, the tokens that the caller marks as tolerant of less precision; None: it marks none.
        parts: of an expert, each of which has a choice of its own (moe/decisions/partition.py); 1: experts are whole.
    """

    choices: Choices
    weight_KT: Tensor
    capacity: int | Tensor
    l_aux: Tensor
    used_T: Tensor | None = None
    identity_weight_T: Tensor | None = None
    score_KT: Tensor | None = None
    tolerant_T: Tensor | None = None
    parts: int = 1

    @property
    def used_token(self) -> Tensor | None:
        """[T] the mask that it was made with, with kinds if `facts` were asked for."""
        if self.used_T is None or self.tolerant_T is None:
            return self.used_T
        return self.used_T * (1 + (TOLERANT - 1) * self.tolerant_T.to(torch.uint8))

    @property
    def exp_counts(self) -> Tensor:
        """[E] int64 tokens per expert before drops; identity experts last."""
        return self.choices.counts_E

    @cached_property
    def expert_KT(self) -> Tensor:
        """int64 global expert id, -1 where the capacity limit dropped the choice or the token is masked."""
        kept_KT, expert_KT = self.choices.kept_KT, self.choices.expert_KT
        return expert_KT if kept_KT is None else torch.where(kept_KT, expert_KT, -1)

    @cached_property
    def location_KT(self) -> Tensor:
        """int64 number of the token among its expert's tokens, from 0; 0 where dropped or masked."""
        location_KT, kept_KT = self.choices.location_KT, self.choices.kept_KT
        return location_KT if kept_KT is None else location_KT * kept_KT


def route(
    gate: TopKGate,
    tokens_TD: Tensor,
    used_token: Tensor | None = None,
    exclude_T: Tensor | None = None,
    softmax: GateSoftmax = "deepspeed",
    group: dist.ProcessGroup | None = None,
    facts: bool = False,
) -> Routing:
    """Routes every token to its top-k experts (fp32 throughout).

    Args:
        gate: holds weight, k, capacity factors, noise policy, drop policy, and perhaps another router than DeepSpeed's.
        tokens_TD: any floating dtype; any number of tokens, also none.
        used_token: T elements of any shape and dtype, zero for padding. A token of padding is routed to no expert, and
            does not count for loss, counts and capacity. `TOLERANT` marks a token that tolerates less precision, such
            as a patch of an image.
        exclude_T: an expert that each token may not choose, -1 for none (DGMoE's second choice, paper eq. 23;
            top-1 only).
        softmax: among which experts a token's weights are normalised, see `_weights`; DeepSpeed's router only.
        group: agree on the largest capacity of these ranks (padded buffers need it; one blocking all-reduce).
        facts: also say what early decisions read: scores and tolerant tokens (moe/early.py).

    Raises:
        ValueError: a mask or choice that is none, or of another number of tokens; or `exclude_T` with k > 1.
    """
    own = gate if isinstance(gate, RouterGate) else None
    if gate.k > 1 and exclude_T is not None:
        raise ValueError(f"exclude_T is defined for k = 1, not k = {gate.k}")
    check_tokens("used_token", used_token, len(tokens_TD))
    check_tokens("exclude", exclude_T, len(tokens_TD), integer=True)
    used_T = None
    if used_token is not None:
        used_T = to_device(used_token.reshape(-1) != 0, tokens_TD.device)
    if exclude_T is not None:
        exclude_T = to_device(exclude_T.reshape(-1), tokens_TD.device)
    logits_TE = _logits(gate, tokens_TD, used_T)
    if own is not None and own.z_loss is not None:
        logits_TE = own.z_loss.attach(logits_TE, used_T)
    routing = _routing(gate, logits_TE, used_T, exclude_T, softmax, facts)
    if facts and used_token is not None and used_token.dtype != torch.bool:
        tolerant_T = to_device(used_token.reshape(-1) == TOLERANT, tokens_TD.device)
        routing = replace(routing, tolerant_T=tolerant_T)
    if own is not None and own.balance is not None and gate.training:
        own.balance.count(routing.exp_counts)
    return _agreed(routing, group)


def _routing(
    gate: TopKGate,
    logits_TE: Tensor,
    used_T: Tensor | None,
    exclude_T: Tensor | None,
    softmax: GateSoftmax,
    facts: bool,
) -> Routing:
    if len(logits_TE) == 0:
        return _route_none(gate, logits_TE)
    if isinstance(gate, RouterGate) and gate.router.score_func is not None:
        return _route_scores(gate, logits_TE, used_T, exclude_T, facts)
    noise = gate.noisy_gate_policy == "RSample" and gate.training
    plain = used_T is None and exclude_T is None and not noise and softmax in ("all", "deepspeed")
    top1 = kernels_of(logits_TE).top1 if gate.k == 1 and plain else None
    if top1 is not None:
        return _route_top1(top1, gate, logits_TE)
    return _route_all(gate, logits_TE, used_T, exclude_T, softmax, facts)


def _route_none(gate: TopKGate, logits_TE: Tensor) -> Routing:
    """A rank without tokens still takes part in the exchange, also of its weights' gradient."""
    none_KT, counts_E = logits_TE[:, : gate.k].t(), logits_TE.new_zeros(logits_TE.shape[1], dtype=torch.int64)
    expert_KT = none_KT.long()
    choices = Choices(expert_KT, None, Order(expert_KT[0], expert_KT), counts_E, counts_E)
    return Routing(choices, none_KT, 0, logits_TE.sum(), score_KT=none_KT.detach())


def _route_all(
    gate: TopKGate,
    logits_TE: Tensor,
    used_T: Tensor | None,
    exclude_T: Tensor | None,
    softmax: GateSoftmax,
    facts: bool,
) -> Routing:
    probability_TE = F.softmax(logits_TE, dim=1)
    chosen_KT = choose(gate, logits_TE, probability_TE, used_T, exclude_T)
    tokens = _count(used_T, len(logits_TE))
    limit = _limit(gate, tokens) if gate.drop_tokens else None
    choices, balanced_E = keep(gate, probability_TE, chosen_KT, used_T, limit)
    l_aux = _balancing_loss(gate.k, probability_TE, balanced_E, tokens, used_T)
    weight_KT = _weights(softmax, logits_TE, probability_TE, chosen_KT, choices.kept_KT)
    score_KT = _of_choices(probability_TE, chosen_KT) if facts else None
    capacity = choices.counts_E.max() if limit is None else limit
    return Routing(choices, weight_KT, capacity, l_aux, used_T, score_KT=score_KT)


def _route_top1(kernels: Top1Kernels, gate: TopKGate, logits_TE: Tensor) -> Routing:
    """As `_route_all`, for the case that most models have."""
    limit = min(capacity_of(gate, len(logits_TE)), len(logits_TE)) if gate.drop_tokens else None
    choices, weight_KT, l_aux = choose_top1(kernels, logits_TE, gate.use_rts, limit)
    capacity = choices.counts_E.max() if limit is None else limit
    return Routing(choices, weight_KT, capacity, l_aux, score_KT=weight_KT.detach())


def _route_scores(
    gate: RouterGate, logits_TE: Tensor, used_T: Tensor | None, exclude_T: Tensor | None, facts: bool
) -> Routing:
    """A router's choice. The balancing loss counts all choices and is 1 for even loads, whatever k is."""
    score_TE = score(gate.router, logits_TE)
    chosen_KT = choose_by_score(gate, score_TE, exclude_T)
    tokens = _count(used_T, len(logits_TE))
    limit = _limit(gate, tokens) if gate.drop_tokens else None
    choices, _ = keep(gate, score_TE.detach(), chosen_KT, used_T, limit)
    l_aux = _balancing_loss(1, shares(gate.router, score_TE), choices.counts_E / gate.k, tokens, used_T)
    weight_KT = weigh(gate, score_TE, chosen_KT, choices.kept_KT)
    score_KT = _of_choices(score_TE, chosen_KT) if facts else None
    capacity = choices.counts_E.max() if limit is None else limit
    return Routing(choices, weight_KT, capacity, l_aux, used_T, score_KT=score_KT)


def _of_choices(score_TE: Tensor, chosen_KT: Tensor) -> Tensor:
    """[K, T] without gradient."""
    return score_TE.detach().gather(1, chosen_KT.t()).t()


def _count(used_T: Tensor | None, tokens: int) -> int | Tensor:
    if used_T is None:
        return tokens
    return used_T.sum() if used_T.is_cuda else int(used_T.sum())


def _limit(gate: TopKGate, tokens: int | Tensor) -> int | Tensor:
    """No expert takes more tokens than there are."""
    if isinstance(tokens, Tensor):
        return torch.minimum(capacity_of(gate, tokens), tokens)
    return min(capacity_of(gate, tokens), tokens)


def _logits(gate: TopKGate, tokens_TD: Tensor, used_T: Tensor | None) -> Tensor:
    if gate.noisy_gate_policy == "Jitter" and gate.training:
        ones_D = torch.ones(tokens_TD.shape[1], device=tokens_TD.device)

        def noise(rows: int) -> Tensor:
            return sharded_moe.multiplicative_jitter(ones_D.expand(rows, -1), device=ones_D.device)

        tokens_TD = tokens_TD.float() * draw(noise, len(tokens_TD), used_T)
    return fp32_logits(tokens_TD, gate.wg.weight, used_T)


def _balancing_loss(
    k: int, probability_TE: Tensor, counts_E: Tensor, tokens: int | Tensor, used_T: Tensor | None
) -> Tensor:
    """Mean probability times share of the tokens, summed over experts; 1 where both are even."""
    E = probability_TE.shape[1]
    if used_T is None:
        mean_E = probability_TE.mean(0)
    else:
        tokens = tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
        mean_E = (probability_TE * used_T.unsqueeze(1)).sum(0) / tokens
    balance_E = mean_E * (counts_E / tokens)
    if k == 1:
        return balance_E.sum() * E
    return balance_E.mean() * E * E / (k if k > 2 else 1)


def _weights(
    softmax: GateSoftmax, logits_TE: Tensor, probability_TE: Tensor, chosen_KT: Tensor, kept_KT: Tensor | None
) -> Tensor:
    """[K, T] gate values. `softmax` names the experts among which a token's probabilities add up to 1.

    "all"        all experts. The weights of the chosen ones add up to less.
    "chosen"     the chosen ones (paper eq. 2-3), dropped ones too. The weights of the kept ones add up to less.
    "kept"       the chosen ones that the capacity limit has not dropped.
    "deepspeed"  as DeepSpeed: "all" for k = 1, "kept" for more. There a sum below 1.2e-7 counts as 1.2e-7.
    """
    softmax = FORMER_GATE_SOFTMAX.get(softmax, softmax)
    source_TE = logits_TE if softmax in ("chosen", "kept") else probability_TE
    weight_KT = source_TE.gather(1, chosen_KT.t()).t()
    if softmax in ("chosen", "kept"):
        if softmax == "kept" and kept_KT is not None:
            # Not -inf: for a token without kept choices the softmax and its gradient would be 0/0.
            weight_KT = weight_KT.masked_fill(~kept_KT, torch.finfo(weight_KT.dtype).min)
        weight_KT = F.softmax(weight_KT, dim=0)
    if kept_KT is not None:
        weight_KT = weight_KT * kept_KT
    if softmax != "deepspeed" or len(chosen_KT) == 1:
        return weight_KT
    if len(chosen_KT) == 2:
        total_T = weight_KT.sum(0)
    else:  # in DeepSpeed's order
        total_T = torch.zeros_like(probability_TE).scatter(1, chosen_KT.t(), weight_KT.t()).sum(1)
    return weight_KT / total_T.clamp(min=torch.finfo(total_T.dtype).eps)


def _agreed(routing: Routing, group: dist.ProcessGroup | None) -> Routing:
    if group is None or dist.get_world_size(group) == 1:
        return routing
    own = routing.exp_counts.new_empty(()).fill_(routing.capacity)  # `tensor(…, device=…)` would make the host wait
    return replace(routing, capacity=largest(own, group))
