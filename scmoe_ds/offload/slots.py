"""Room for experts on a device: modules whose weights are written over, one expert after another."""

from __future__ import annotations

import copy

import torch
from torch import nn

from scmoe_ds.offload.pages import page_memory, whole_pages
from scmoe_ds.offload.widening import WideningLinear


def slot_dtype(expert: nn.Module, stored: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which dtype a slot holds weights.

    On a CPU narrower weights stay as they are, see `WideningLinear`. Beside a GPU they are converted as they arrive.

    Args:
        expert: as the model has it.
        stored: dtype of the slower tier.
        dtype: of the computation.
    """
    holders = [module for module in expert.modules() if next(module.parameters(recurse=False), None) is not None]
    linear = all(type(module) is nn.Linear for module in holders)
    return stored if device.type == "cpu" and linear and stored.itemsize < dtype.itemsize else dtype


def expert_slots(
    expert: nn.Module, count: int, stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[nn.Module]:
    """Modules of an expert's shape, in evaluation mode; their weights are not initialised.

    On a CPU each parameter begins at a page, so that it can be read to straight from a file.

    Args:
        expert: on the meta device.
        stored, dtype, device: as for `slot_dtype`.
    """
    held = slot_dtype(expert, stored, dtype, device)
    pattern = copy.deepcopy(expert).eval().requires_grad_(False)
    for name, module in list(pattern.named_modules()) if held != dtype else ():
        if type(module) is nn.Linear:
            pattern.set_submodule(name, WideningLinear(module, held).requires_grad_(False))
    if device.type != "cpu":
        return [copy.deepcopy(pattern).to(dtype).to_empty(device=device) for _ in range(count)]
    pattern = pattern.to(held)
    sizes = {name: whole_pages(parameter.nbytes) for name, parameter in pattern.named_parameters()}
    memory = page_memory(count * sum(sizes.values()))
    slots = []
    for _ in range(count):
        slot = copy.deepcopy(pattern)
        for name, like in list(slot.named_parameters()):
            taken, memory = memory[: like.nbytes], memory[sizes[name] :]
            path, _, leaf = name.rpartition(".")
            value = taken.view(held).view(like.shape)
            setattr(slot.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        slots.append(slot)
    return slots
