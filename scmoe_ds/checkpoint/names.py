"""Names of parameters that do not depend on the layout, and the rules by which tensor parallelism divides them."""

from __future__ import annotations

import re
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from scmoe_ds.parallel.tensor import Split, tensor_parallel_rule

_EXPERT = re.compile(r"(?<=\.deepspeed_experts\.)\d+(?=\.)")
"""An expert's id, local in a model and in DeepSpeed's optimizer files, global in its expert files and here."""


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
    """Each parameter's name on this rank to its name in the whole model: local expert i of place p is global expert
    p * local experts + i."""
    first = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            place = groups._get_expert_parallel_rank(module.expert_group_name) if module.ep_size > 1 else 0
            first[name] = place * module.num_local_experts
    found = {}
    for name, _ in model.named_parameters():
        layer = layer_of(name)
        found[name] = name if layer is None else with_expert(name, first[layer] + expert_of(name))
    return found


def saved_splits(engine: Any) -> dict[str, list[Any]]:
    """Name to [dim, sections] of each parameter that tensor parallelism divides; experts under the id 0."""
    model = getattr(engine, "module", None)
    rules = {} if model is None else {with_expert(n, 0): tensor_parallel_rule(p) for n, p in model.named_parameters()}
    return {name: [rule.dim, list(rule.sections)] for name, rule in rules.items() if rule is not None}


def read_splits(saved: dict[str, list[Any]]) -> dict[str, Split]:
    """The inverse of `saved_splits`."""
    return {name: Split(dim, tuple(sections)) for name, (dim, sections) in saved.items()}
