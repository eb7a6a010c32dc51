"""Who holds which expert, and what its parameters are called on a rank and in the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import bwc, groups
from torch import nn

_EXPERT = re.compile(r"(?<=\.deepspeed_experts\.)\d+(?=\.)")
"""An expert's id: local in a model and in DeepSpeed's optimizer files, global in DeepSpeed's expert files and here."""


@dataclass(frozen=True)
class Placement:
    """Which experts of a layer each rank of the world holds.

    The ranks of an expert-parallel group are consecutive. Each holds the same number of consecutive experts. Under
    expert tensor parallelism the ranks of a tensor-parallel group hold pieces of the same experts. Then an
    expert-parallel group has one rank of each of several consecutive tensor-parallel groups: ranks 0, 2 and ranks 1, 3
    for sizes of 2 and 2.

    Attributes:
        expert_parallel_size: ranks among which the experts are divided.
        num_local_experts: experts that each of them holds.
        expert_tensor_parallel_size: ranks that each hold a piece of one expert; 1: experts are whole.
    """

    expert_parallel_size: int
    num_local_experts: int
    expert_tensor_parallel_size: int = 1

    @classmethod
    def of(cls, moe: MoE) -> Placement:
        """The placement of a layer's experts; its process groups need not exist yet."""
        divided_by = mpu_tensor_parallel_size() if moe.enable_expert_tensor_parallelism else 1
        return cls(moe.ep_size, moe.num_local_experts, divided_by)

    def expert_parallel_rank(self, rank: int) -> int:
        """Rank within the expert-parallel group, from the rank in the world."""
        return rank // self.expert_tensor_parallel_size % self.expert_parallel_size

    def first_expert(self, rank: int) -> int:
        """Global id of the first expert of a rank of the world: its local expert i is global expert first + i."""
        return self.expert_parallel_rank(rank) * self.num_local_experts

    def first_ranks_of(self, expert: int) -> range:
        """The lowest ranks of the world that hold an expert: as many as it has pieces, in their order."""
        first = expert // self.num_local_experts * self.expert_tensor_parallel_size
        return range(first, first + self.expert_tensor_parallel_size)


def own_expert_parallel_rank(moe: MoE) -> int:
    """This process's rank within the expert-parallel group of a layer; 0 where there is no process group."""
    return Placement.of(moe).expert_parallel_rank(dist.get_rank() if dist.is_initialized() else 0)


def own_first_expert(moe: MoE) -> int:
    """Global id of the first expert that this process holds of a layer."""
    return own_expert_parallel_rank(moe) * moe.num_local_experts


def mpu_tensor_parallel_size() -> int:
    """Tensor-parallel ranks, as the `mpu` says that DeepSpeed was given."""
    return int(bwc.bwc_tensor_model_parallel_world_size(groups.mpu))


def layer_of(name: str) -> str | None:
    """The MoE layer of an expert's parameter; None for a dense one."""
    return name.split(".deepspeed_moe.")[0] if _EXPERT.search(name) else None


def expert_of(name: str) -> int:
    """The id in the name of an expert's parameter."""
    match = _EXPERT.search(name)
    assert match is not None, name
    return int(match[0])


def with_expert(name: str, number: int) -> str:
    """The same parameter of another expert; a dense one's name as it is."""
    return _EXPERT.sub(str(number), name)


def global_names(model: nn.Module) -> dict[str, str]:
    """Maps the name of each parameter on this rank to its name in the whole model, which has experts' global ids."""
    first = {name: own_first_expert(module) for name, module in model.named_modules() if isinstance(module, MoE)}
    found = {}
    for name, _ in model.named_parameters():
        layer = layer_of(name)
        found[name] = name if layer is None else with_expert(name, first[layer] + expert_of(name))
    return found
