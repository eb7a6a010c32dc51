"""A partial partition where it runs: the gate chooses experts, and their parts are what rows are sent to.

Shape suffixes: T tokens, K choices of a token, C their parts: K * P.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scmoe_ds.moe.early import rerouted
from scmoe_ds.moe.gate import Routing


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
        parted = replace(routing, weight_KT=self.repeat(routing.weight_KT), score_KT=score_CT)
        return rerouted(parted, place_CT, kept_CT, self.num_experts * self.parts)

    def repeat(self, of_choice_KT: Tensor) -> Tensor:
        """[K, T] → [K * P, T], each choice's row P times in turn."""
        return of_choice_KT.repeat_interleave(self.parts, 0)
