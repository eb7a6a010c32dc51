"""Source experts of which a rank holds its own: what AutoEP slices, without memory for the others.

AutoEP reads rows `first … last` of a parameter [experts, …]. The parameter has its full shape, in virtual memory that
nobody has touched. Only the rank's own rows are written, and so only they take memory. The others would read as zero;
the module refuses to compute.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.compat import parameters_of
from scmoe_ds.errors import ScMoEConfigError

_MARK = "scmoe_own_experts"
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""The kernel does not count the region against what it may promise. Python names it from 3.13 on."""


@dataclass(frozen=True)
class OwnExperts:
    """Which experts of a model were loaded on this rank."""

    ep_size: int
    ep_rank: int


def untouched(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU that takes no memory where nobody writes."""
    numel = shape.numel()
    if numel == 0:
        return torch.zeros(shape, dtype=dtype)
    region = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(region, dtype=dtype, count=numel).view(shape)


def widen(experts: nn.Module, name: str, experts_in_all: int, first: int) -> None:
    """Gives a parameter with a rank's own rows its full shape, in place.

    Args:
        experts_in_all: rows of the full parameter.
        first: where the own rows stand.
    """
    own = experts.get_parameter(name)
    whole = untouched(torch.Size((experts_in_all, *own.shape[1:])), own.dtype)
    whole[first : first + len(own)].copy_(own.detach())
    parameters_of(experts)[name] = nn.Parameter(whole, own.requires_grad)
    del own
    with suppress(AttributeError, OSError):  # glibc keeps what was freed; other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def mark(model: nn.Module, own: OwnExperts, experts: list[nn.Module], is_adapted: bool) -> None:
    """Remembers what was loaded. From here on the experts refuse to compute, until AutoEP has replaced their block.

    Args:
        is_adapted: the weights are a ScMoE's, and the model's own class would compute another function of them.
    """

    def refuse(module: nn.Module, *_: Any) -> None:
        of_rank = f"holds the weights of expert-parallel rank {own.ep_rank} of {own.ep_size} alone"
        what = of_rank if own.ep_size > 1 else "has the weights of a ScMoE, which only the engine makes of it"
        raise ScMoEConfigError(
            f"{type(module).__name__} {what}; give the model to scmoe_ds.initialize before its first forward pass"
        )

    setattr(model, _MARK, own)
    if own.ep_size > 1 or is_adapted:
        for module in experts:
            module.register_forward_pre_hook(refuse)


def own_experts_of(model: nn.Module) -> OwnExperts | None:
    """What was loaded of a model; None: all of it, by others."""
    found: OwnExperts | None = getattr(model, _MARK, None)
    return found


def check_loaded(model: nn.Module, ep_size: int) -> None:
    """Compares what was loaded with the size of a JSON. Raises a ScMoEConfigError if they differ."""
    own = own_experts_of(model)
    if own is not None and own.ep_size not in (1, ep_size):
        raise ScMoEConfigError(
            f"expert_parallel.autoep_size = {ep_size}: the model was loaded for {own.ep_size} by "
            "scmoe_ds.from_pretrained; give both the same JSON"
        )
