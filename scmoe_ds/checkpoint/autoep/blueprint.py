"""How AutoEP, a Hugging Face model and its files call one weight.

AutoEP keeps a block's path and puts its own modules there: the router is `router.gate`, the experts are `experts.w1`,
`w3` (gate, up: [experts, F, D]) and `w2` (down: [experts, D, F]). The model itself has fused experts, such as
`experts.gate_up_proj` [experts, 2F, D]. Most families' files hold one tensor per expert; transformers converts when it
reads and when it writes, and its own conversion is used here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.compat_transformers import revert_conversion, tied_names
from scmoe_ds.errors import CheckpointError
from scmoe_ds.replace.autoep_model import moe_specs

State = dict[str, Tensor]
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.)")


class Block:
    """One MoE block of the model, before AutoEP replaces it.

    Attributes:
        path: of the module in the model.
        num_experts: routed experts that have weights.
        gate_up, down: names of the fused parameters.
        rows: how many experts `gate_up` has room for. LongCat's has rows for experts without weights too.
    """

    def __init__(self, spec: Any, model: nn.Module) -> None:
        self.spec, self.path, self.num_experts = spec, spec.moe_module_name, spec.num_experts
        self.experts = f"{self.path}.{spec.experts_name}"
        if spec.expert_storage != "fused_3d" or spec.expert_w3_name is not None:
            raise CheckpointError(
                f"{self.experts}: its experts are not fused as gate_up_proj and down_proj; load the model with "
                "transformers' own from_pretrained"
            )
        self.gate_up, self.down = (f"{self.experts}.{name}" for name in (spec.expert_w1_name, spec.expert_w2_name))
        gate_up, down = model.get_parameter(self.gate_up), model.get_parameter(self.down)
        self.rows = gate_up.shape[0]
        self.gate_up_shape, self.down_shape = gate_up.shape[1:], down.shape[1:]
        self._hidden_first = gate_up.shape[2] == 2 * down.shape[1]  # [E, D, 2F] and [E, F, D] instead

    def trained_name(self, name: str) -> str | None:
        """AutoEP's name of one of the block's other weights."""
        spec, inside = self.spec, name.removeprefix(f"{self.path}.")
        if name == inside:
            return None
        bias = ".".join(filter(None, (spec.e_score_correction_bias_path, "e_score_correction_bias")))
        if spec.e_score_correction_bias_path is not None and inside == bias:
            return f"{self.path}.router.e_score_correction_bias"
        homes = {
            spec.router_name: "router.gate",
            spec.shared_experts_name: "shared_experts",
            spec.shared_experts_gate_name: "shared_experts_gate",
        }
        for own, trained in homes.items():
            if own and inside.startswith(f"{own}."):
                # A router's weight may be one module deeper (LongCat's classifier).
                rest = inside.rpartition(".")[2] if own == spec.router_name else inside.removeprefix(f"{own}.")
                return f"{self.path}.{trained}.{rest}"
        return None

    def fused(self, w1: Tensor, w2: Tensor, w3: Tensor) -> State:
        """AutoEP's experts [n, F, D], [n, D, F], [n, F, D] as the model holds them."""
        gate_up, down = torch.cat([w1, w3], dim=1), w2
        if self._hidden_first:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return {self.gate_up: gate_up, self.down: down}

    def without_weights(self, dtype: torch.dtype) -> Tensor:
        """The rows of `gate_up` behind the last expert, zero."""
        return torch.zeros(self.rows - self.num_experts, *self.gate_up_shape, dtype=dtype)


class Blueprint:
    """A Hugging Face model without weights, and its MoE blocks.

    Args:
        model: on the meta device, as transformers makes it.
        expert_parallel: the section of the DeepSpeed JSON.

    Raises:
        ScMoEConfigError: AutoEP finds no MoE block, or does not know the family.
    """

    def __init__(self, model: nn.Module, expert_parallel: Mapping[str, Any]) -> None:
        self.model = model
        self.blocks = [Block(spec, model) for spec in moe_specs(model, expert_parallel)]

    @cached_property
    def expert_names(self) -> set[str]:
        """The model's names of all fused experts."""
        return {name for block in self.blocks for name in (block.gate_up, block.down)}

    @cached_property
    def other_names(self) -> dict[str, str]:
        """The model's name of every other weight to AutoEP's. Tied weights stand there once."""
        left_out = self.expert_names | tied_names(self.model)
        return {name: self._trained_name(name) for name in self.model.state_dict() if name not in left_out}

    def _trained_name(self, name: str) -> str:
        return next(filter(None, (block.trained_name(name) for block in self.blocks)), name)

    def layers(self) -> dict[str, list[str]]:
        """Path of each layer to its `other_names`; "" to those of no layer."""
        groups: dict[str, list[str]] = {}
        for name in self.other_names:
            layer = _LAYER.match(name)
            groups.setdefault(layer[0] if layer else "", []).append(name)
        return groups

    @cached_property
    def buffers(self) -> set[str]:
        """The model's names of weights that are no parameters."""
        return {name for name, _ in self.model.named_buffers()}

    def in_files(self, state: State, first_expert: int = 0) -> State:
        """Weights under the names and in the shapes of the files.

        Args:
            state: whole other weights, or some consecutive experts of one block, by the model's names.
            first_expert: the id of the first of these experts.
        """
        found = revert_conversion(self.model, state)
        return {_renumbered(name, first_expert): tensor for name, tensor in found.items()}

    def has_fused_files(self, block: Block) -> bool:
        """Whether the files hold a block's experts in one tensor, as the model does."""
        like = torch.empty(1, *block.down_shape, device="meta")
        return block.down in self.in_files({block.down: like})


_ANY_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def _renumbered(name: str, first: int) -> str:
    return _ANY_EXPERT.sub(lambda found: str(int(found[0]) + first), name) if first else name
