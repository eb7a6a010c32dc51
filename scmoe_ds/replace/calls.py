"""What a hook sees of the call of a module that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.trace.recorder import PairRecorder


def first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor among a module's arguments, or in a tuple that comes first."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(first, Tensor) and first.is_floating_point():
            return first
    return None


def checkpoint_region() -> object:
    """Identifies the activation checkpoint that surrounds the call; None outside of any."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def recomputes(region: object) -> bool:
    """Whether torch's activation checkpointing repeats a forward pass there."""
    return getattr(region, "__qualname__", "").startswith("_recomputation_hook")


def marked_inputs(
    recorder: PairRecorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            (marked,) = recorder.open(name, value)
            return (*args[:index], marked, *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            (marked,) = recorder.open(name, value)
            return args, {**kwargs, key: marked}
    return args, kwargs


def parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its children. Lists and dicts of modules are never called: their children stand for them."""
    for name, child in block.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}.{inner}", each) for inner, each in parts(child))
        else:
            yield name, child
