"""Gates of a trained model that prefer their first expert, and what their layers then load on ranks.

Shape suffixes: T tokens, D hidden, E experts, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.gate import Routing

_HIGHEST, _SEARCHES = 30.0, 24


def skew_gates(model: GPT, run: Callable[[], object], skew: float) -> None:
    """Adds a constant to the logit of each layer's first expert: it gets `skew` times the mean load. Collective.

    What a gate reads comes from a norm with a bias: it lies in a plane, and a vector with the same product with all of
    it exists. Its multiple is added to the expert's row of the gate, so that the layer has a gate like any other.

    Args:
        run: passes of which the loads are taken.

    Raises:
        ValueError: there is no such vector: the norm's bias is zero, as before training.
    """
    for pair in model.scheduled_pairs():
        layer = pair.layer
        seen = _inputs(layer, run).double()
        weight_ED = layer.deepspeed_moe.gate.wg.weight
        direction_D = torch.linalg.lstsq(seen, seen.new_ones(len(seen), 1)).solution[:, 0]
        direction_D = _of_rank_zero(direction_D)
        constant_T = seen @ direction_D
        if not torch.allclose(constant_T, torch.ones_like(constant_T), atol=0.01):
            raise ValueError("what a gate reads has no constant part: give the norm before it a bias that is not zero")
        logits_TE = seen @ weight_ED.double().t()
        low, high = -_HIGHEST, _HIGHEST
        for _ in range(_SEARCHES):
            middle = (low + high) / 2
            shifted_TE = logits_TE.clone()
            shifted_TE[:, 0] += middle * constant_T
            counts_E = torch.bincount(shifted_TE.topk(layer.top_k).indices.flatten(), minlength=len(weight_ED)).double()
            dist.all_reduce(counts_E)
            low, high = (middle, high) if counts_E[0] / counts_E.mean() < skew else (low, middle)
        with torch.no_grad():
            weight_ED[0] += (high * direction_D).to(weight_ED.dtype)


def _inputs(layer: Any, run: Callable[[], object]) -> Tensor:
    """[T, D] what the layer's gate reads."""
    seen: list[Tensor] = []
    begin = layer.begin

    def watched(shortcut: Tensor, *arguments: Any, **how: Any) -> Any:
        seen.append(shortcut.detach().reshape(-1, shortcut.shape[-1]).clone())
        return begin(shortcut, *arguments, **how)

    layer.begin = watched
    try:
        run()
    finally:
        del layer.begin
    return torch.cat(seen)


def _of_rank_zero(value: Tensor) -> Tensor:
    dist.broadcast(value, 0)
    return value


class Loads:
    """A routing rule that changes nothing and counts one layer's rows: of each expert, and those that tolerate low
    precision.

    Args:
        settings: say what tolerates it.
    """

    in_training = False

    def __init__(self, settings: LowPrecision, experts: int) -> None:
        self.settings = settings
        self.rows_2E = torch.zeros(2, experts, dtype=torch.float64)
        self.scores: list[Tensor] = []

    def apply(self, routing: Routing) -> Routing:
        """The same routing, counted."""
        expert_KT, experts, tolerant = routing.expert_KT, self.rows_2E.shape[1], self.settings.tolerant(routing)
        kept_KT = expert_KT >= 0
        marked_KT = torch.zeros_like(kept_KT) if tolerant is None else tolerant.expand_as(kept_KT) & kept_KT
        self.rows_2E += torch.stack([torch.bincount(expert_KT[of], minlength=experts) for of in (kept_KT, marked_KT)])
        if routing.score_KT is not None:
            self.scores.append(criterion(routing)[kept_KT])
        return routing


def count_loads(model: GPT, run: Callable[[], object], settings: LowPrecision) -> list[Loads]:
    """Of all layers over all ranks; scores of this rank. Collective."""
    layers = [pair.layer for pair in model.scheduled_pairs()]
    for layer in layers:
        layer.routing_rule = Loads(settings, layer.num_experts)
    run()
    found = [layer.routing_rule for layer in layers]
    for layer, loads in zip(layers, found, strict=True):
        layer.routing_rule = None
        dist.all_reduce(loads.rows_2E)
    return found


def over_ranks(loads: Loads, ranks: int) -> dict[str, list[float]]:
    """What a number of expert-parallel ranks would have: rows over their mean, and the share that tolerates."""
    rows_2R = loads.rows_2E.view(2, ranks, -1).sum(2)
    share = rows_2R[1] / rows_2R[0].clamp(min=1)
    return {"load": (rows_2R[0] / rows_2R[0].mean()).tolist(), "tolerant": share.tolist()}
