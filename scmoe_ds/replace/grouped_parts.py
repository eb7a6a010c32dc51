"""AutoEP's experts in parts: the parameters stay whole, and each part is slices of them along the neurons.

So a rank holds all parts of its experts, and DeepSpeed's optimizers and checkpoints see whole experts.

Shape suffixes: L local experts, P parts of each, D hidden, F neurons of an expert, S rows.
"""

from __future__ import annotations

from typing import cast

import torch
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor

from scmoe_ds.config.messages import fail


class GroupedParts(GroupedExperts):
    """Computes the rows of parts, P of each expert, with AutoEP's own kernels. A `GroupedExperts` becomes one in place.

    A module of its own class, because ZeRO-3 gathers parameters in the hooks of a module's call.
    """

    parts: int
    kernels: tuple[GroupedExperts]
    """Experts of a part's width without weights; in a tuple, so that their parameters are none of this module's."""

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """[S, D] rows in the order of parts → the same.

        Args:
            num_tokens_per_expert: int32 [L * P] rows of each part; part p of expert l is l * P + p.
        """
        weights = {"w1": self._input_parts(self.w1), "w3": self._input_parts(self.w3)}
        # No view: the parts of [D, F] rows of one expert do not follow each other. A third of the weights is copied.
        weights["w2"] = self.w2.unflatten(2, (self.parts, -1)).transpose(1, 2).flatten(0, 1)
        given = x, num_tokens_per_expert
        return cast(Tensor, torch.func.functional_call(self.kernels[0], weights, given))

    def _input_parts(self, whole_LFD: Tensor) -> Tensor:
        """[L, F, D] → the same memory as [L * P, F / P, D]."""
        return whole_LFD.view(-1, whole_LFD.shape[1] // self.parts, whole_LFD.shape[2])


def divide_grouped(name: str, experts: GroupedExperts, parts: int) -> None:
    """Makes experts compute in parts, in place.

    Args:
        name: of their layer, for messages.

    Raises:
        ScMoEConfigError: neurons that cannot be divided so.
    """
    neurons, hidden = getattr(experts.w1, "ds_shape", experts.w1.shape)[1:]  # ZeRO-3 keeps an empty tensor
    if neurons % parts:
        raise fail(
            "scmoe.expert_partition", parts, f"must divide the {neurons} neurons of an expert of {name}; use another"
        )
    if experts.use_grouped_mm and neurons // parts * experts.w1.element_size() % 16:
        rule = (
            f"a part of {neurons // parts} neurons of {name} is not a multiple of 16 bytes, which the grouped product "
            'needs; use fewer parts, or set "use_grouped_mm": false in expert_parallel'
        )
        raise fail("scmoe.expert_partition", parts, rule)
    with torch.device("meta"):
        kernels = GroupedExperts(
            hidden,
            neurons // parts,
            experts.num_experts * parts,
            experts.use_grouped_mm,
            not experts.use_triton_grouped_mm,
            experts.activation,
            experts.activation_alpha,
            experts.activation_limit,
            experts.gate_up_impl,
        )
    experts.__class__ = GroupedParts
    cast(GroupedParts, experts).parts = parts
    cast(GroupedParts, experts).kernels = (kernels,)
