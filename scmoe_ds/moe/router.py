"""Routers beside DeepSpeed's gate: scores, a choice by corrected scores, weights from the scores alone.

    s_TE = softmax(x W) or sigmoid(x W)                            in fp32
    a token chooses the K best of s + b, in the groups that score best
    its weights are scale * s of the chosen ones, divided by their sum if `route_norm`

The bias b keeps experts evenly loaded (scmoe_ds.moe.balance). Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3
(arXiv 2412.19437), LongCat-Flash (arXiv 2509.01322), and transformers' modules of these models.

Shape suffixes: T tokens, E experts, K routed experts per token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.moe.balance import BiasBalance
from scmoe_ds.moe.z_loss import ZLoss

CORRECTION_BIAS = "e_score_correction_bias"
"""The buffer's name, as in transformers and AutoEP."""


class KeepsBias:
    """For a router, a module: its correction bias keeps its dtype."""

    _buffers: dict[str, Tensor | None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """The bias keeps its fp32 where a model is cast to bf16: steps of 0.001 would be lost."""
        kept = self._buffers.get(CORRECTION_BIAS)
        super()._apply(fn, recurse)  # type: ignore[misc]  # of the module
        moved = self._buffers.get(CORRECTION_BIAS)
        if kept is not None and moved is not None and moved.dtype != kept.dtype:
            self._buffers[CORRECTION_BIAS] = kept.to(moved.device)
        return self


class RouterGate(KeepsBias, TopKGate):
    """DeepSpeed's gate as the place of a router's weights: `wg` as ever, and the correction bias, a buffer [E] in fp32.

    Attributes:
        router: how its tokens choose.
        balance: moves the bias; None: there is none, or it stays.
        z_loss: None: there is none.
    """

    router: RouterConfig = RouterConfig()
    balance: BiasBalance | None = None
    z_loss: ZLoss | None = None


def correction_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases of a model's routers by their names, which are the same on all ranks."""
    return {name: bias for name, bias in model.named_buffers() if name.endswith(f".{CORRECTION_BIAS}")}


def equip(gate: TopKGate, router: RouterConfig) -> None:
    """Gives a gate another router in the place of its own. Its parameters stay.

    Raises:
        ValueError: a router that does not fit the number of experts, k, or the gate's noise.
    """
    num_experts = gate.wg.out_features
    if router.score_func == "model":
        raise ValueError("router.score_func = 'model': is for the layers of AutoEP; use 'softmax' or 'sigmoid'")
    for field, broken, rule in router.rules(gate.k, num_experts):
        if broken:
            raise ValueError(f"router.{field} = {getattr(router, field)!r}: {rule}")
    if router.score_func is not None and gate.noisy_gate_policy == "RSample":
        raise ValueError("noisy_gate_policy = 'RSample': is for DeepSpeed's gate; use 'Jitter', or no router")
    if not isinstance(gate, RouterGate):
        gate.__class__ = RouterGate
    gate.router = router
    if router.z_loss_coefficient:
        gate.z_loss = ZLoss(router.z_loss_coefficient)
    if router.has_bias:
        bias_E = torch.zeros(num_experts, dtype=torch.float32, device=gate.wg.weight.device)
        gate.register_buffer(CORRECTION_BIAS, bias_E)
        if router.load_balance_coeff:
            gate.balance = BiasBalance(gate, router.load_balance_coeff, router.load_balance_rule, num_experts)


def score(router: RouterConfig, logits_TE: Tensor) -> Tensor:
    """[T, E] fp32 scores."""
    return logits_TE.sigmoid() if router.score_func == "sigmoid" else F.softmax(logits_TE, dim=1)


@torch.no_grad()
def choose_by_score(gate: RouterGate, score_TE: Tensor, exclude_T: Tensor | None = None) -> Tensor:
    """[K, T] int64 the experts that each token chooses, best first."""
    bias_E = getattr(gate, CORRECTION_BIAS, None)
    by_TE = score_TE if bias_E is None else score_TE + bias_E
    if exclude_T is not None:
        experts_E = torch.arange(by_TE.shape[1], device=by_TE.device)
        by_TE = by_TE.masked_fill(exclude_T.unsqueeze(1) == experts_E, float("-inf"))
    return _within_groups(gate.router, by_TE).topk(gate.k, dim=1).indices.t().contiguous()


def _within_groups(router: RouterConfig, by_TE: Tensor) -> Tensor:
    """The same scores, minus infinity outside of each token's best groups."""
    groups, limit = router.num_expert_groups, router.num_limited_groups
    if groups is None or limit is None:
        return by_TE
    by_TGX = by_TE.unflatten(1, (groups, -1))
    best = by_TGX.topk(1 if router.group_score_func == "max" else 2, dim=2).values.sum(2)
    chosen_TG = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(limit, dim=1).indices, True)
    return by_TGX.masked_fill(~chosen_TG.unsqueeze(2), float("-inf")).flatten(1)


def weigh(gate: RouterGate, score_TE: Tensor, chosen_KT: Tensor, kept_KT: Tensor | None) -> Tensor:
    """[K, T] fp32 weights, 0 where not kept. A dropped choice counts in the sum, as in Megatron-core."""
    weight_KT = score_TE.gather(1, chosen_KT.t()).t()
    if gate.router.normalises(gate.k):
        weight_KT = weight_KT / (weight_KT.sum(0) + 1e-20)
    if kept_KT is not None:
        weight_KT = weight_KT * kept_KT
    return weight_KT * gate.router.route_scale


def shares(router: RouterConfig, score_TE: Tensor) -> Tensor:
    """[T, E] scores that add up to 1, for the balancing loss."""
    return score_TE if router.score_func == "softmax" else score_TE / (score_TE.sum(1, keepdim=True) + 1e-20)
