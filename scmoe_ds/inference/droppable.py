"""Whether MoE layers can leave rows out, and whether thresholds are theirs (inference/dropping.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.placement import own_first_expert
from scmoe_ds.sparse.sparsity_file import digest_of


def top_k_of(layers: Sequence[Any]) -> int:
    """Routed experts of a token; 0 without layers."""
    return max((layer.top_k for layer in layers), default=0)


def digests_of(layers: Sequence[Any]) -> tuple[str, str | None]:
    """`gates` and `neurons` of a `Sparsity`; no neurons where this rank does not hold the first experts whole. Under
    ZeRO-3 collective over the ranks that share a parameter."""
    inputs = [_inputs(layer) for layer in layers]
    gates = [layer.deepspeed_moe.gate.wg if isinstance(layer, StagedMoE) else layer.router.gate for layer in layers]
    digest = digest_of(_whole([gate.weight] for gate in gates))
    return digest, digest_of(_whole(inputs)) if all(inputs) else None


def _inputs(layer: Any) -> list[Tensor]:
    """Input projections of the first expert, or of all as one tensor each; none if it is another rank's."""
    if not isinstance(layer, StagedMoE):
        return [] if layer.slices.rank else [layer.experts.w1, layer.experts.w3]
    experts = getattr(layer.deepspeed_moe.experts, "deepspeed_experts", None)
    if experts is None or layer.enable_expert_tensor_parallelism or own_first_expert(layer):
        return []
    return [experts[0].input.weight] if hasattr(experts[0], "input") else []


def _whole(weights_of_layers: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
    for weights in weights_of_layers:
        partitioned = [each for each in weights if hasattr(each, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            yield torch.cat([each if each.dim() == 2 else each[0] for each in weights])


def check_scores(layer: Any) -> None:
    """
    Raises:
        ArgumentError: a layer whose scores tell nothing.
    """
    if not isinstance(layer, StagedMoE) and layer.top_k == 1 and layer.router.route_norm:
        raise ArgumentError(
            f"--drop-rate: the only score of a token is renormalised to 1 in {layer.name}, so there is no criterion; "
            "use a model with norm_topk_prob = false, or with two or more routed experts"
        )
