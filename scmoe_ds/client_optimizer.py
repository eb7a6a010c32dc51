"""Optimizers that a user hands to `initialize`, with the experts in parameter groups of their own.

ZeRO divides a dense parameter between all ranks but an expert between the ranks that hold it, and therefore wants them
in different groups, marked "moe". DeepSpeed makes them for the optimizers of its JSON only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

from scmoe_ds.config_errors import ScMoEConfigError


def with_expert_groups(optimizer: Any, scheduler: Any = None) -> Any:
    """An optimizer, or a function from parameter groups to one, whose groups hold experts or dense parameters only.

    Args:
        optimizer: changed in place. Groups that are marked already stay as they are.
        scheduler: the learning-rate scheduler that is handed over with it.

    Raises:
        ScMoEConfigError: a scheduler that was made for the groups as they were.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return _after(optimizer)
    before = len(optimizer.param_groups)
    _split(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) and len(optimizer.param_groups) != before:
        raise ScMoEConfigError(
            f"lr_scheduler was made for the optimizer's {before} parameter group(s), but experts need groups of their "
            f"own, which makes {len(optimizer.param_groups)}: hand over a function, "
            "lr_scheduler=lambda optimizer: …, or mark the groups beforehand with "
            "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"
        )
    return optimizer


def _after(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], torch.optim.Optimizer]:
    def make_and_split(parameters: Any) -> torch.optim.Optimizer:
        return _split(make(parameters))

    return make_and_split


def _split(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    groups = optimizer.param_groups
    has_experts = any(is_moe_param(parameter) for group in groups for parameter in group["params"])
    if not has_experts or any(group.get("moe") for group in groups):
        return optimizer
    for number, group in enumerate(groups):
        group.setdefault("name", f"group {number}")  # DeepSpeed tells groups apart by it
        group.pop("param_names", None)  # torch's, one per parameter: they would no longer fit
    split = split_params_into_different_moe_groups_for_optimizer(list(groups))
    optimizer.param_groups[:] = [group for group in split if group["params"]]
    return optimizer
