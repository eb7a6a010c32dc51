"""A partial partition where it runs: the gate chooses experts, and their parts are what rows are sent to.

Shape suffixes: T tokens, K choices of a token, C their parts: K * P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.moe.early import rerouted
from scmoe_ds.moe.gate import Routing
from scmoe_ds.parallel.tensor import Split, shard


@dataclass(frozen=True)
class Partition:
    """A routing rule under which each choice of an expert is one of all of its parts, in training too.

    Attributes:
        parts: P. Part p of expert e is the place e * P + p. All parts of an expert get its rows and its weight, so that
            their sum is what the whole expert returns.
        num_experts: that the gate chooses from.
    """

    parts: int
    num_experts: int
    in_training: bool = True

    def apply(self, routing: Routing) -> Routing:
        """[K, T] choices of experts → [K * P, T] of parts, those of a choice following each other."""
        choices = routing.choices
        whole_CT, part_C = self.repeat(choices.expert_KT), torch.arange(self.parts, device=choices.expert_KT.device)
        place_CT = whole_CT * self.parts + part_C.repeat(len(choices.expert_KT)).unsqueeze(1)
        kept_CT = None if choices.kept_KT is None else self.repeat(choices.kept_KT)
        score_CT = None if routing.score_KT is None else self.repeat(routing.score_KT)
        parted = replace(routing, weight_KT=self.repeat(routing.weight_KT), score_KT=score_CT, parts=self.parts)
        return rerouted(parted, place_CT, kept_CT, self.num_experts * self.parts)

    def repeat(self, of_choice_KT: Tensor) -> Tensor:
        """[K, T] → [K * P, T], each choice's row P times in turn."""
        # Not `repeat_interleave`, whose gradient is a scatter: on a GPU it adds in any order.
        return of_choice_KT.unsqueeze(1).expand(-1, self.parts, -1).flatten(0, 1)


def divide_experts(moe: MoE, parts: int) -> None:
    """Makes the experts of a new layer parts of fewer ones, in place: its gate chooses from 1 / `parts` as many."""
    gate = moe.deepspeed_moe.gate
    num_experts = moe.num_experts // parts
    weight = gate.wg.weight
    gate.wg = nn.Linear(gate.wg.in_features, num_experts, bias=False, dtype=weight.dtype, device=weight.device)
    moe.partition = Partition(parts, num_experts)


def whole_experts(layer: Any) -> int:
    """Experts that a layer's gate chooses from.

    Args:
        layer: DeepSpeed's or this package's. `num_experts` of a StagedMoE counts parts, each of which is an expert to
            DeepSpeed; that of an AutoEP layer counts whole experts.
    """
    partition: Partition | None = getattr(layer, "partition", None)
    return int(layer.num_experts) if partition is None else partition.num_experts


def parts_of(layer: Any) -> int:
    """Parts of each of a layer's experts; 1: they are whole."""
    partition: Partition | None = getattr(layer, "partition", None)
    return 1 if partition is None else partition.parts


@dataclass(frozen=True)
class PartOf:
    """What a parameter of a part is of the whole expert's.

    Attributes:
        parts: of the expert.
        rule: how its neurons are divided; None: an output bias, of which each part has an equal share.
    """

    parts: int
    rule: Split | None

    def of(self, whole: Tensor, part: int) -> Tensor:
        """Of a whole expert's parameter."""
        return whole / self.parts if self.rule is None else shard(whole, self.rule, part, self.parts)


def mark_part(parameter: Tensor, parts: int, rule: Split | None) -> None:
    """Notes on a parameter that it is a part of a whole expert's; `rule` is the whole parameter's."""
    parameter.part_of_expert = PartOf(parts, rule)  # type: ignore[attr-defined]  # a mark of ours


def part_of(parameter: Tensor) -> PartOf | None:
    """What `mark_part` noted; None: the parameter is whole."""
    return getattr(parameter, "part_of_expert", None)
