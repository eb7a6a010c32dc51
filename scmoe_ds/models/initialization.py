"""Weights that depend on the seed and on each parameter's global name only.

Two runs of one seed start with equal weights. The expert-parallel size, the order of construction and the schedule make
no difference. So the two can be compared step by step.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from scmoe_ds.moe.partition import part_of
from scmoe_ds.moe.placement import expert_of, global_names, with_expert
from scmoe_ds.parallel.tensor import shard, tensor_parallel_rank, tensor_parallel_rule, tensor_parallel_size


def initialize_parameters(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Megatron's initialisation, in place: N(0, std), output projections N(0, std / sqrt(2 * num_layers)), norms 1,
    biases 0.

    The ranks that divide a parameter between them draw the same random numbers and each keep their part.

    Args:
        model: on the CPU; routed experts in DeepSpeed's layout.
    """
    names = global_names(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            scale = std / (2 * num_layers) ** 0.5 if name.endswith(".output.weight") else std
            rule, shape, whole_name, part = tensor_parallel_rule(parameter), list(parameter.shape), names[name], 0
            divided = part_of(parameter)
            if divided is not None:  # an expert's parts start as what it would have been
                rule, (expert, part) = divided.rule, divmod(expert_of(whole_name), divided.parts)
                whole_name = with_expert(whole_name, expert)
            if rule is not None:
                shape[rule.dim] = sum(rule.sections)
            generator = _generator(seed, whole_name)
            whole = torch.empty(shape, dtype=parameter.dtype).normal_(0.0, scale, generator=generator)
            if divided is not None:
                parameter.copy_(divided.of(whole, part))
            else:
                parameter.copy_(shard(whole, rule, tensor_parallel_rank(), tensor_parallel_size()))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
