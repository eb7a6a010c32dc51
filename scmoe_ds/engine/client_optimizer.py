"""Optimizers and parameter groups that a user hands to `initialize`: with the experts in groups of their own, and with
the parameters that a replacement of layers has added.

ZeRO divides a dense parameter between all ranks but an expert between the ranks that hold it, and therefore wants them
in different groups, marked "moe". DeepSpeed makes them for the optimizers of its JSON only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from torch import nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.checks import check_model
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.modeling_adapted import ShortcutParts

_ORIGINS: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
"""Of an optimizer whose groups were split: the number of the former group behind each present one."""
_OF_GROUPS = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
"""Attributes of torch's learning-rate schedulers with an entry for each group."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Megatron's two groups of all parameters that require a gradient: biases and norms have no weight decay.

    Args:
        model: with its MoE layers.

    Returns:
        groups for a torch optimizer. `initialize` splits the experts off each; elsewhere
        `deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer` does.
    """
    check_model(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    plain = [parameter for parameter in trainable if parameter.ndim <= 1]
    return [{"params": decayed, "name": "decay"}, {"params": plain, "weight_decay": 0.0, "name": "no_decay"}]


def in_groups(model: nn.Module, optimizer: Any, model_parameters: Any, scheduler: Any) -> tuple[Any, Any]:
    """The optimizer and the parameters for DeepSpeed; without parameters of the user's, those of `parameter_groups`.

    Raises:
        ScMoEConfigError: an optimizer or a scheduler that is none, or a scheduler of other groups.
    """
    for name, given in (("optimizer", optimizer), ("lr_scheduler", scheduler)):
        if given is not None and not callable(given) and not hasattr(given, "step"):
            raise ScMoEConfigError(
                f"{name} = {given!r}: must be an object of torch or a function that makes one; to name it, write the "
                f'"{name.removeprefix("lr_")}" section of the DeepSpeed JSON'
            )
    if optimizer is not None:
        return with_expert_groups(optimizer, scheduler), model_parameters or parameter_groups(model)
    return None, parameter_groups(model) if model_parameters is None else model_parameters


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


def trainable(model: nn.Module, given: Any) -> Any:
    """The user's parameters; if there are none, those that require a gradient when DeepSpeed asks for them, which is
    after AutoEP has replaced some."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad) if given is None else given


class AfterReplacement:
    """An optimizer of the user's for DeepSpeed's AutoEP, whose parameters are there only later.

    DeepSpeed puts the new parameters into the groups of those that they replace, and then calls this for the optimizer.

    Args:
        optimizer: of torch.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        return _split(self.optimizer)


def after_replacement(optimizer: Any, scheduler: Any) -> Any:
    """As `with_expert_groups`, for experts that DeepSpeed's AutoEP makes while the engine is built.

    Raises:
        ScMoEConfigError: a scheduler that was made for the groups as they are.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None if optimizer is None else _after(optimizer)
    if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise ScMoEConfigError(
            f"lr_scheduler was made for the optimizer's {len(optimizer.param_groups)} parameter group(s), but AutoEP's "
            "experts need groups of their own: hand over a function, lr_scheduler=lambda optimizer: …"
        )
    return AfterReplacement(optimizer)


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
    before = {id(parameter): number for number, group in enumerate(groups) for parameter in group["params"]}
    split = split_params_into_different_moe_groups_for_optimizer(list(groups))
    optimizer.param_groups[:] = [group for group in split if group["params"]]
    _ORIGINS[optimizer] = [before[id(group["params"][0])] for group in optimizer.param_groups]
    return optimizer


def follow_groups(scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Lets a scheduler that was made for an optimizer's groups go on with the groups into which they have been split.

    Its settings are lists, an entry for each group. The new groups have the entries of those that they come from.
    """
    origins = _ORIGINS.get(getattr(scheduler, "optimizer", None))
    for name in _OF_GROUPS:
        values = getattr(scheduler, name, None)
        if origins is not None and isinstance(values, list) and len(values) == max(origins) + 1 < len(origins):
            setattr(scheduler, name, [values[origin] for origin in origins])


def listed(model_parameters: Any) -> Any:
    """What the user handed over as a list that may be changed; groups have the names by which DeepSpeed knows them.

    Raises:
        ScMoEConfigError: nothing in it.
    """
    if model_parameters is None or isinstance(model_parameters, torch.Tensor):
        return model_parameters
    found = [model_parameters] if isinstance(model_parameters, dict) else list(model_parameters)
    if not found:
        raise ScMoEConfigError(
            "model_parameters is empty: a generator gives its parameters once; hand over a list, or "
            "leave it out to train all that require a gradient"
        )
    return [
        {"name": f"group {number}", **each, "params": _members(each["params"])}
        if isinstance(each, dict)
        else _unnamed(each)
        for number, each in enumerate(found)
    ]


def _members(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else [_unnamed(each) for each in params]


def _unnamed(parameter: Any) -> Any:
    """torch takes (name, parameter) as well; DeepSpeed, where there are experts, does not."""
    return parameter[1] if isinstance(parameter, tuple) else parameter


def add_new_parameters(groups: list[Any], model: nn.Module, old: set[int]) -> None:
    """Puts each parameter that has come with a replacement of layers into the group of its like.

    The shared expert follows the routed experts, everything else the gate, a vector the norm that reads the tap. What a
    decoder layer of others gets follows a parameter of that layer with as many dimensions.

    Args:
        groups: dicts with "params", or parameters; changed in place.
        model: with its replaced layers.
        old: `id` of the parameters from before.
    """
    if not groups or not isinstance(groups[0], dict):
        groups += [parameter for parameter, _ in _new_parameters(model, old)]
        return
    for parameter, likes in _new_parameters(model, old):
        dense = [group for group in groups if not group.get("moe")] or groups
        chosen = dense[0]
        for like in likes:
            holder = next((group for group in groups if any(each is like for each in group["params"])), None)
            if holder is not None:  # experts may have been put into a copy of their group already
                options = _options(holder)
                chosen = holder if holder in dense else next((g for g in dense if _options(g) == options), chosen)
                break
        chosen["params"] = [*chosen["params"], parameter]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "name", "moe", "param_names")}


def _new_parameters(model: nn.Module, old: set[int]) -> Iterator[tuple[nn.Parameter, list[Any]]]:
    """Each new parameter, and those that it is like, the nearest first."""
    for block in [module for module in model.modules() if isinstance(getattr(module, "shortcut", None), ShortcutParts)]:
        there = [each for each in block.parameters() if id(each) in old]
        for parameter in block.shortcut.parameters():  # type: ignore[union-attr]
            if id(parameter) not in old:
                yield parameter, [like for like in there if (like.ndim > 1) == (parameter.ndim > 1)]
    for layer in [module for module in model.modules() if isinstance(module, HookedScMoE)]:
        experts = dict(layer.deepspeed_moe.experts.deepspeed_experts[0].named_parameters())
        gate, vector = layer.deepspeed_moe.gate.wg.weight, None
        if layer.pair is not None and layer.pair.tap.norm is not None:
            vector = next(layer.pair.tap.norm.parameters(), None)
        for name, parameter in layer.named_parameters():
            if id(parameter) not in old:
                expert = experts.get(name.removeprefix("mlp.")) if name.startswith("mlp.") else None
                likes = [expert, vector if parameter.ndim <= 1 else None, gate]
                yield parameter, [like for like in likes if like is not None]
