"""Weights that depend on the seed and on each parameter's global name only.

Two runs of one seed start equal whatever the expert-parallel size, the order of construction or the schedule: that is
what makes them comparable step by step.
"""

from __future__ import annotations

import hashlib
import re

import torch
from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.parallel.tensor import shard, tensor_parallel_rule

_LOCAL_ID = re.compile(r"(?<=\.deepspeed_experts\.)\d+")


def initialize_parameters(
    model: nn.Module, seed: int, std: float, num_layers: int, ep_rank: int = 0, tp_rank: int = 0, tp_size: int = 1
) -> None:
    """Megatron's initialisation, in place: N(0, std), output projections N(0, std / sqrt(2 * num_layers)), norms 1,
    biases 0.

    Args:
        model: on the CPU; routed experts in DeepSpeed's layout.
        ep_rank: this rank's place in its expert-parallel group: local expert i is global expert
            ep_rank * num_local_experts + i.
        tp_rank, tp_size: this rank's place among the tensor-parallel ranks, which divide one set of random numbers.
    """
    first_id = {
        name: module.num_local_experts * (ep_rank if module.ep_size > 1 else 0)
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            scale = std / (2 * num_layers) ** 0.5 if name.endswith(".output.weight") else std
            rule, shape = tensor_parallel_rule(parameter), list(parameter.shape)
            if rule is not None:
                shape[rule.dim] = sum(rule.sections)
            generator = _generator(seed, _global_name(name, first_id))
            whole = torch.empty(shape, dtype=parameter.dtype).normal_(0.0, scale, generator=generator)
            parameter.copy_(shard(whole, rule, tp_rank, tp_size))


def _global_name(name: str, first_id: dict[str, int]) -> str:
    layer = name.split(".deepspeed_moe.")[0]
    return _LOCAL_ID.sub(lambda match: str(int(match[0]) + first_id[layer]), name)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
