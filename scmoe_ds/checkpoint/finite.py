"""Refuses to save weights or optimizer states from which training cannot go on.

A step with a finite loss can leave such values: after a learning rate far too high, or after a bit flip in memory. When
an optimizer's moment is not finite, the loss shows it only two steps later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import offloaded
from scmoe_ds.compat import high_precision_mapping
from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.agreement import gather

_LARGEST_WEIGHT = math.sqrt(torch.finfo(torch.float32).max)
"""The square of a larger weight is infinite, so that no norm of the weights can be computed."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class NotFiniteError(CheckpointError):
    """The values that are to be saved are useless."""


@dataclass(frozen=True)
class _Held:
    """A tensor of this rank: what it is, its largest good value, the parameter's name and the optimizer group."""

    what: str
    tensor: Tensor
    largest: float
    name: str | None = None
    group: int = 0


def check(engine: Any, name: str) -> None:
    """Looks at all weights, fp32 copies and optimizer states of all ranks, on their devices. Collective.

    Args:
        name: of the checkpoint that is to be written, with its flag.

    Raises:
        NotFiniteError: on every rank, with rank and parameter of the first finding.
    """
    for rank, found in enumerate(gather(_finding(engine))):
        if found is not None:
            raise NotFiniteError(
                f"{name} was not saved: on rank {rank}, {found}; training cannot go on from that. The checkpoint "
                "before it stays: go on from it with --auto-resume. If it happens again at this iteration, lower the "
                "learning rate or set gradient_clipping; if not, look at the memory of that rank's device"
            )


def _finding(engine: Any) -> str | None:
    """Offloaded experts are looked at one after another."""
    found = (_finding_in(engine, tensors) for tensors in chain([_tensors(engine)], _moved(engine)))
    return next((each for each in found if each is not None), None)


def _moved(engine: Any) -> Iterator[list[_Held]]:
    largest = {offloaded.MASTER: _LARGEST_WEIGHT}
    for parameters in offloaded.held(engine):
        yield [
            _Held(
                "the fp32 weights" if key in largest else f"{key} in the optimizer",
                value,
                largest.get(key, torch.finfo(torch.float32).max),
                name,
            )
            for name, states in parameters.items()
            for key, value in states.items()
        ]


def _finding_in(engine: Any, tensors: Iterable[_Held]) -> str | None:
    held = [each for each in tensors if each.tensor.dtype in _DTYPES and each.tensor.numel()]
    for each, largest in zip(held, _magnitudes([each.tensor.detach() for each in held]), strict=True):
        if not largest <= each.largest:
            bad = ~(each.tensor.detach().float().abs().flatten() <= each.largest)
            place = int(bad.nonzero()[0])
            value = each.tensor.detach().flatten()[place].item()
            owner = each.name or _parameter_at(engine, each.group, place)
            return f"{each.what} of {owner} {'is' if bad.sum() == 1 else f'are ({int(bad.sum())} elements)'} {value:g}"
    return None


def _magnitudes(tensors: list[Tensor]) -> list[float]:
    """The largest absolute value of each tensor, NaN if it has one. The host waits once for each device."""
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
    """Names the parameter that has an element of a group's flat buffer."""
    for name, parameter in engine.module.named_parameters():
        mapping = high_precision_mapping(parameter)
        if mapping is not None and mapping.param_group_index == group:
            address = mapping.hp_fragment_address
            if address.start <= place < address.start + address.numel:
                return name
    return f"element {place} of the optimizer's group {group}"
