"""Weights that depend on the seed and on each parameter's global name only.

Two runs of one seed start with equal weights. The expert-parallel size, the order of construction and the schedule make
no difference. So the two can be compared step by step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.moe.decisions.partition import part_of
from scmoe_ds.moe.placement import expert_of, global_names, own_first_expert, with_expert
from scmoe_ds.parallel.tensor import shard, tensor_parallel_rank, tensor_parallel_rule, tensor_parallel_size


def initialize_parameters(model: nn.Module, seed: int, std: float, num_layers: int) -> None:
    """Megatron's initialisation, in place: N(0, std), output projections N(0, std / sqrt(2 * num_layers)), norms 1,
    biases 0.

    The ranks that divide a parameter between them draw the same random numbers and each keep their part.

    Args:
        model: on the CPU; routed experts in DeepSpeed's layout. Those on the meta device get their values when they
            are offloaded.
    """
    names, rules = global_names(model), _Rules(seed, std, num_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.ndim == 1:
                parameter.copy_(rules.value(names[name], parameter.shape, parameter.dtype))
                continue
            rule, shape, whole_name, part = tensor_parallel_rule(parameter), list(parameter.shape), names[name], 0
            divided = part_of(parameter)
            if divided is not None:  # an expert's parts start as what it would have been
                rule, (expert, part) = divided.rule, divmod(expert_of(whole_name), divided.parts)
                whole_name = with_expert(whole_name, expert)
            if rule is not None:
                shape[rule.dim] = sum(rule.sections)
            whole = rules.value(whole_name, shape, parameter.dtype)
            if divided is not None:
                parameter.copy_(divided.of(whole, part))
            else:
                parameter.copy_(shard(whole, rule, tensor_parallel_rank(), tensor_parallel_size()))
    for name, layer in model.named_modules():
        if isinstance(layer, MoE) and any(each.is_meta for each in layer.deepspeed_moe.experts.parameters()):
            first = f"{name}.deepspeed_moe.experts.deepspeed_experts.0."
            layer.deepspeed_moe.experts.value_of = partial(_value_of, rules, first, own_first_expert(layer))


class _Rules(NamedTuple):
    seed: int
    std: float
    num_layers: int

    def value(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A whole parameter, by its global name."""
        if len(shape) == 1:
            return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0, dtype=dtype)
        scale = self.std / (2 * self.num_layers) ** 0.5 if name.endswith(".output.weight") else self.std
        return torch.empty(shape, dtype=dtype).normal_(0.0, scale, generator=_generator(self.seed, name))


def _value_of(rules: _Rules, first: str, first_id: int, member: int, part: str, like: Tensor) -> Tensor:
    return rules.value(with_expert(first + part, first_id + member), like.shape, like.dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
