"""Puts whole parameters and optimizer states into an engine of any layout.

Each rank reads what it holds: for the model its tensor-parallel part of the weights, for the fp32 weights and the
optimizer's states the piece of that part that ZeRO gave it. Nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import offloaded
from scmoe_ds.checkpoint.saved_state import SavedState
from scmoe_ds.compat import high_precision_mapping
from scmoe_ds.errors import CheckpointError
from scmoe_ds.moe.placement import global_names
from scmoe_ds.moe.router import correction_biases
from scmoe_ds.offload.trainable import offloaded_names
from scmoe_ds.parallel.tensor import shard, tensor_parallel_rank, tensor_parallel_rule, tensor_parallel_size


class Weights(Protocol):
    """A source of whole parameters."""

    path: Path

    def names(self) -> list[str]:
        """Global names."""

    def shape(self, name: str) -> Sequence[int]:
        """Of a whole parameter, without reading it."""

    def read(self, name: str) -> Tensor:
        """A whole parameter."""


def put_weights(engine: Any, weights: Weights) -> None:
    """Sets every parameter of the model, the fp32 copies that the optimizer steps, and the routers' biases. Raises a
    CheckpointError if parameters are missing, or have other shapes."""
    names = global_names(engine.module)
    check_parameters(engine.module, weights, names)
    left_out = offloaded.stand_ins(engine.module)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if id(parameter) in left_out:
                continue
            value = own_part(weights.read(names[name]), parameter, names[name])
            parameter.copy_(value)  # not through `data`: who keeps something of a weight sees that it changed
            mapping = high_precision_mapping(parameter)
            if mapping is not None:
                mapping.hp_fragment.data.copy_(_own_piece(value, mapping))
        for name, bias in correction_biases(engine.module).items():
            bias.copy_(weights.read(name))
    offloaded.put_weights(engine.module, weights)


def put_state(engine: Any, saved: SavedState, schedule: bool = True) -> None:
    """Sets weights, optimizer states, learning-rate schedule, loss scale and counters of an engine before its first
    step.

    Args:
        schedule: whether to load the saved learning-rate schedule.

    Raises:
        CheckpointError: another model.
    """
    put_weights(engine, saved)
    names = global_names(engine.module)
    inner, left_out = engine.optimizer.optimizer, offloaded.stand_ins(engine.module)
    if left_out:
        offloaded.put_state(engine, saved)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            mapping = high_precision_mapping(parameter)
            if mapping is None or id(parameter) in left_out:
                continue
            group = inner.param_groups[mapping.param_group_index]
            group.update(saved.group_options(names[name]))
            flat = group["params"][0]
            whole, other = saved.optimizer_state(names[name])
            inner.state[flat].update(other)
            for key in whole:
                value = own_part(saved.read(names[name], key), parameter, names[name])
                buffer = inner.state[flat].setdefault(key, torch.zeros_like(flat))
                address = mapping.hp_fragment_address
                buffer.narrow(0, address.start, address.numel).copy_(_own_piece(value, mapping))
    _put_counters(engine, saved, schedule)


def _put_counters(engine: Any, saved: SavedState, schedule: bool) -> None:
    header = saved.header
    if schedule and engine.lr_scheduler is not None and header["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(header["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = header["global_steps"], header["skipped_steps"]
    engine.global_samples = header["global_samples"]
    scaler = saved.optimizer_header.get("loss_scaler")
    if engine.fp16_enabled() and saved.layout[fields.PRECISION] == "fp16" and scaler is not None:
        engine.optimizer.loss_scaler = scaler


def check_parameters(model: nn.Module, weights: Weights, names: Mapping[str, str]) -> None:
    """Compares names and shapes before tensors are read or allocated.

    Args:
        names: each parameter's name in this model to its name in the whole one.

    Raises:
        CheckpointError: the weights lack a parameter of the model, or one has another shape.
    """
    biases, left_out, moved = correction_biases(model), offloaded.stand_ins(model), offloaded_names(model)
    there = {name: each for name, each in model.named_parameters() if id(each) not in left_out}
    if missing := sorted({*(names[name] for name in there), *moved, *biases} - set(weights.names())):
        raise CheckpointError(f"{weights.path} has no {missing[0]} (and {len(missing) - 1} others of this model)")
    for name, parameter in there.items():
        rule, expected = tensor_parallel_rule(parameter), list(parameter.shape)
        if rule is not None:
            expected[rule.dim] = sum(rule.sections)
        found = weights.shape(names[name])
        if list(found) != expected:
            raise _another_shape(names[name], found, expected)
    for name, (_, _, part) in moved.items():
        if list(found := weights.shape(name)) != list(part.shape):
            raise _another_shape(name, found, part.shape)
    for name, bias in biases.items():
        if list(found := weights.shape(name)) != list(bias.shape):
            raise _another_shape(name, found, bias.shape)


def _another_shape(name: str, found: Sequence[int], expected: Sequence[int]) -> CheckpointError:
    return CheckpointError(f"the checkpoint's {name} has shape {tuple(found)}, this model's {tuple(expected)}")


def own_part(value: Tensor, parameter: nn.Parameter, name: str) -> Tensor:
    """This rank's tensor-parallel part of a whole parameter."""
    part = shard(value, tensor_parallel_rule(parameter), tensor_parallel_rank(), tensor_parallel_size())
    if part.shape != parameter.shape:
        raise _another_shape(name, part.shape, parameter.shape)
    return part


def _own_piece(value: Tensor, mapping: Any) -> Tensor:
    """The elements of a tensor-parallel part that ZeRO gave this rank."""
    address = mapping.lp_fragment_address
    return value.reshape(-1).narrow(0, address.start, address.numel)
