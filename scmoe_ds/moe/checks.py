"""What a caller of the stages can get wrong, in one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError

_LEAST = {"hidden_size": 1, "num_experts": 1, "ep_size": 1, "k": 1, "min_capacity": 0}
_SWITCHES = ("drop_tokens", "use_rts", "use_tutel", "enable_expert_tensor_parallelism", "top2_2nd_expert_sampling")
_NOISE = (None, "Jitter", "RSample")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises a ValueError for an argument of a layer that DeepSpeed would take as it is, or fail at in words of torch.

    Args:
        given: by the names of `deepspeed.moe.layer.MoE`.
    """
    for name in given.keys() & _LEAST.keys():
        check_count(name, given[name], _LEAST[name])
    for name in given.keys() & {"capacity_factor", "eval_capacity_factor"}:
        value = given[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise ValueError(f"{name} = {value!r}: must be a finite number above 0")
    for name in given.keys() & set(_SWITCHES):
        if not isinstance(given[name], bool):
            raise ValueError(f"{name} = {given[name]!r}: must be True or False")
    if not isinstance(given["expert"], nn.Module):
        raise ValueError(f"expert = {given['expert']!r}: must be a module, which is copied for each expert")
    noise = given.get("noisy_gate_policy")
    if noise not in _NOISE:
        raise ValueError(f"noisy_gate_policy = {noise!r}: must be one of {', '.join(map(repr, _NOISE))}")
    if noise == "RSample" and given["k"] > 1:
        raise ValueError(f"noisy_gate_policy = 'RSample': goes with k = 1 only, and k = {given['k']}; use 'Jitter'")
    if given.get("use_tutel"):
        raise ValueError("use_tutel: this layer brings its own dispatch; leave it False")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises a ValueError for a value that is no whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        rule = f"must be at least {least}" if type(value) is int else f"must be a whole number of at least {least}"
        raise ValueError(f"{name} = {value!r}: {rule}")


def check_tokens(name: str, value: Any, tokens: int, integer: bool = False) -> None:
    """Raises a ValueError for a mask or choice of tokens that is no tensor of one element for each token."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: must be a tensor with one element for each token")
    if value.numel() != tokens:
        raise ValueError(f"{name} of shape {tuple(value.shape)}: must have one element for each of the {tokens} tokens")
    if integer and (value.is_floating_point() or value.dtype == torch.bool):
        raise ValueError(f"{name} of dtype {value.dtype}: must be integers, the numbers of experts")


def check_model(model: object) -> None:
    """Raises a ScMoEConfigError for something else in a model's place."""
    if not isinstance(model, nn.Module):
        raise ScMoEConfigError(f"model is a {type(model).__name__}: hand over the model, a torch.nn.Module, first")


def check_input(name: str, value: Tensor, hidden_size: int) -> None:
    """Raises a ValueError for an input of a layer that is no floating-point tensor [..., D].

    Args:
        name: of the argument.
        value: what was handed over.
        hidden_size: D of the layer.
    """
    if not isinstance(value, Tensor):
        hint = "; take the tensor out of it" if isinstance(value, (tuple, list, dict)) else ""
        raise ValueError(f"{name} is a {type(value).__name__}: must be a tensor [..., {hidden_size}], normalised{hint}")
    if value.ndim == 0 or value.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)}: the last dimension must be {hidden_size}, the layer's hidden_size"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} of dtype {value.dtype}: must be floating point")


def check_dtype(rows: Tensor, experts: nn.Module) -> None:
    """Raises a ValueError for rows of a dtype that no parameter of the experts has, where autocast does not cast them.

    For experts that have failed: some compute in any dtype.
    """
    dtypes = {parameter.dtype for parameter in experts.parameters()}
    if dtypes and rows.dtype not in dtypes and not torch.is_autocast_enabled(rows.device.type):
        has = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"shortcut of dtype {rows.dtype}: the experts have {has}; cast the shortcut, or call the layer under "
            "torch.autocast"
        )
