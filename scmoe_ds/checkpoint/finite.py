"""Before a checkpoint is written: are weights and optimizer state numbers that training can go on from?

A step with a finite loss can leave others: after a learning rate far too high, or a bit that flipped in memory. An
optimizer's moment that is not finite shows in no loss before the step after the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.errors import CheckpointError

_LARGEST_WEIGHT = math.sqrt(torch.finfo(torch.float32).max)
"""The square of a larger one is infinite: no norm and no product of such weights can be computed."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NotFiniteError(CheckpointError):
    """What is to be saved is of no use."""


@dataclass(frozen=True)
class _Held:
    """A tensor of this rank: what it is, its largest good value, its parameter (if one), the optimizer group."""

    what: str
    tensor: Tensor
    largest: float
    name: str | None = None
    group: int = 0


def check(engine: Any, name: str) -> None:
    """Looks at every weight, fp32 copy and optimizer state of every rank, where they are. Collective.

    Args:
        name: of the checkpoint that is to be written, with its flag.

    Raises:
        NotFiniteError: on every rank, with rank and parameter of the first finding.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, _finding(engine))
    for rank, found in enumerate(everywhere):
        if found is not None:
            raise NotFiniteError(
                f"{name} was not saved: on rank {rank}, {found}; training cannot go on from that. The "
                "checkpoint before it stays: go on from it with --auto-resume. If it happens again at "
                "this iteration, lower the learning rate or set gradient_clipping; if not, look at "
                "the memory of that rank's device"
            )


def _finding(engine: Any) -> str | None:
    held = [each for each in _tensors(engine) if each.tensor.dtype in _DTYPES and each.tensor.numel()]
    for each, largest in zip(held, _magnitudes([each.tensor.detach() for each in held]), strict=True):
        if not largest <= each.largest:
            bad = ~(each.tensor.detach().float().abs().flatten() <= each.largest)
            place = int(bad.nonzero()[0])
            value = each.tensor.detach().flatten()[place].item()
            owner = each.name or _parameter_at(engine, each.group, place)
            return f"{each.what} of {owner} {'is' if bad.sum() == 1 else f'are ({int(bad.sum())} elements)'} {value:g}"
    return None


def _magnitudes(tensors: list[Tensor]) -> list[float]:
    """The largest absolute value of each, NaN if it has one; the host waits once for each device."""
    found = {place: torch.stack(tensor.aminmax()).float().abs().amax() for place, tensor in enumerate(tensors)}
    values = [math.nan] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        for place, value in zip(places, torch.stack([found[place] for place in places]).tolist(), strict=True):
            values[place] = value
    return values


def _tensors(engine: Any) -> Iterator[_Held]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for name, parameter in engine.module.named_parameters():
        yield _Held("the weights", parameter, _LARGEST_WEIGHT, name)
    inner = engine.optimizer
    while hasattr(inner, "optimizer"):  # ZeRO's wraps torch's
        inner = inner.optimizer
    for number, group in enumerate(inner.param_groups if inner is not None else ()):
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                yield _Held("the fp32 weights", parameter, _LARGEST_WEIGHT, None, number)
            state = inner.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield _Held(f"{key} in the optimizer", value, torch.finfo(torch.float32).max, name, number)


def _parameter_at(engine: Any, group: int, place: int) -> str:
    """Whose element of the flat buffer of a group that is."""
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None and mapping.param_group_index == group:
            address = mapping.hp_fragment_address
            if address.start <= place < address.start + address.numel:
                return name
    return f"element {place} of the optimizer's group {group}"
