"""Gates that prefer some experts, and what their layers then load on ranks.

Shape suffixes: T tokens, D hidden, E experts, K choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.gate import Routing

STEPS, TINY = 200, 1e-4
"""Corrections of a gate, and the share of the tokens that counts as none, or short of all as all."""
Shares = Sequence[float | None]
"""Of all rows, of each expert; None: as the gate has it, beside the others."""


def first_expert(skew: float, experts: int) -> Shares:
    """Expert 0 has `skew` times the mean load."""
    return [skew / experts] + [None] * (experts - 1)


def even_but_first(skew: float, experts: int) -> Shares:
    """The same, and all others have the same load."""
    return [skew / experts] + [(1 - skew / experts) / (experts - 1)] * (experts - 1)


def first_rank(skew: float, experts: int, ranks: int) -> Shares:
    """Rank 0 has `skew` times the mean load, the others the same; so have the experts of a rank."""
    local = experts // ranks
    return [each / local for each in even_but_first(skew, ranks) for _ in range(local)]


def skew_gates(pairs: Sequence[Any], run: Callable[[], object], share_E: Shares) -> list[Tensor]:
    """Changes gates until the rows of all ranks divide among the experts in these shares. Collective.

    What a gate reads comes from a norm with a bias, so there is a vector with the same product with all of it. Its
    multiples are added to the experts' rows of the gate, so that the layer has a gate like any other. A norm with a
    bias of zero, as before training, gets another one.

    Args:
        pairs: in the order in which a pass runs them.
        run: a pass, of which the rows are counted.

    Returns:
        [T, D] what each pair's gate then reads.

    Raises:
        ValueError: a gate behind a norm without a bias, or a share that is not possible.
    """
    return [_skew_gate(pair, run, share_E) for pair in pairs]


@torch.no_grad()
def _skew_gate(pair: Any, run: Callable[[], object], share_E: Shares) -> Tensor:
    norm, layer = getattr(pair, "shortcut_norm", None) or pair.blocks[-1].mlp_norm, pair.layer
    weight_ED, bias_D = layer.deepspeed_moe.gate.wg.weight, getattr(norm, "bias", None)
    if bias_D is None:
        raise ValueError("what a gate reads has no constant part: take a norm with a bias, such as LayerNorm")
    if not bias_D.any():
        bias_D += len(bias_D) ** -0.5
    # Normalised values add up to 0, so (norm's output / its weight) adds up to this.
    direction_D = (1 / norm.weight).double() / (bias_D / norm.weight).double().sum()
    tokens_TD = _read_by(layer, run)
    constant_T = tokens_TD.double() @ direction_D
    if not torch.allclose(constant_T, torch.ones_like(constant_T), atol=0.01):
        raise ValueError("what a gate reads does not come straight from the norm before it, whose bias would shift it")
    logits_TE = tokens_TD.double() @ weight_ED.double().t()
    added_E = _searched(logits_TE, layer.top_k, share_E)
    weight_ED += torch.outer(added_E, direction_D).to(weight_ED.dtype)
    return tokens_TD


def _searched(logits_TE: Tensor, top_k: int, share_E: Shares) -> Tensor:
    """[E] fp64 what the logits lack for these shares. Collective."""
    given_E = torch.tensor([share is not None for share in share_E])
    aim_E = top_k * torch.tensor([share or 0.0 for share in share_E], dtype=torch.float64)  # of the tokens
    if float(aim_E.max()) > 1 or float(aim_E.min()) < 0:
        raise ValueError(f"shares = {list(share_E)}: an expert has 0 to 1 / {top_k} of the rows")
    spread = logits_TE.std(0).mean()
    dist.all_reduce(spread)
    spread /= dist.get_world_size()
    added_E = logits_TE.new_zeros(len(share_E))
    for number in range(STEPS):
        chosen = (logits_TE + added_E).topk(top_k, dim=1).indices.flatten()
        counts_E = torch.bincount(chosen, minlength=len(share_E)).double()
        dist.all_reduce(counts_E)
        error_E = (aim_E.logit(TINY) - (top_k * counts_E / counts_E.sum()).logit(TINY)).clamp(-1, 1)
        added_E += torch.where(given_E, error_E, 0.0) * spread / (4 * (1 + number / 20))
    return added_E


def _read_by(layer: Any, run: Callable[[], object]) -> Tensor:
    """[T, D] what the layer's gate reads in a pass."""
    seen: list[Tensor] = []
    begin = layer.begin

    def watched(shortcut: Tensor, *arguments: Any, **how: Any) -> Any:
        seen.append(shortcut.detach().flatten(0, -2).clone())
        return begin(shortcut, *arguments, **how)

    layer.begin = watched
    try:
        run()
    finally:
        del layer.begin
    return torch.cat(seen)


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
