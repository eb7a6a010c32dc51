"""Tensor parallelism: which ranks share a layer, and how they divide its parameters.

The groups are megatron-core's: consecutive ranks share a model, and ranks with the same part of it are data parallel.
With a size of 1 there are no groups, and all functions answer for data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How a parameter is divided between tensor-parallel ranks.

    Attributes:
        dim: the dimension that is divided.
        sections: sizes along it of the consecutive parts (query, key and value heads; gate and up projection). Each
            part is divided evenly, and a rank holds its piece of each.
    """

    dim: int
    sections: tuple[int, ...]


def tensor_parallel_rule(parameter: Tensor) -> Split | None:
    """The rule of a parameter; None when all tensor-parallel ranks hold the whole of it."""
    return getattr(parameter, "parallel_split", None)


def mark_tensor_parallel(parameter: Tensor, rule: Split | None, divided: bool) -> None:
    """Stores a parameter's rule, and whether it is `divided` now.

    DeepSpeed counts an undivided parameter only on the first tensor-parallel rank when it computes norms.
    """
    parameter.parallel_split = rule  # type: ignore[attr-defined]  # a mark of ours
    if divided:
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # Megatron's mark


def shard(full: Tensor, rule: Split | None, rank: int, size: int) -> Tensor:
    """One rank's piece of an undivided parameter (or of a tensor of its shape, such as an optimizer state)."""
    if rule is None or size == 1:
        return full
    pieces = [section.chunk(size, dim=rule.dim)[rank] for section in full.split(rule.sections, dim=rule.dim)]
    return torch.cat(pieces, dim=rule.dim)


def unshard(parts: Sequence[Tensor], rule: Split | None) -> Tensor:
    """The undivided parameter from all ranks' pieces, in order of tensor-parallel rank; the inverse of `shard`."""
    if rule is None or len(parts) == 1:
        return parts[0]
    sizes = [section // len(parts) for section in rule.sections]
    by_section = zip(*(part.split(sizes, dim=rule.dim) for part in parts), strict=True)
    return torch.cat([piece for pieces in by_section for piece in pieces], dim=rule.dim)


def start_tensor_parallel(size: int) -> None:
    """Makes the tensor-parallel and data-parallel groups, once per process; none for a size of 1."""
    if size == 1:
        return
    from megatron.core import parallel_state  # takes seconds to import

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    _Groups.tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    _Groups.data_parallel = parallel_state.get_data_parallel_group()
    groups.mpu = ModelParallelUnit()  # layers ask it while the model is built, before the engine would set it


class _Groups:
    tensor_parallel: dist.ProcessGroup | None = None
    data_parallel: dist.ProcessGroup | None = None  # None: the world


def tensor_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that share a layer; None if there are no others."""
    return _Groups.tensor_parallel


def tensor_parallel_size() -> int:
    """Ranks that share a layer."""
    return 1 if _Groups.tensor_parallel is None else dist.get_world_size(_Groups.tensor_parallel)


def tensor_parallel_rank() -> int:
    """This rank's place among them."""
    return 0 if _Groups.tensor_parallel is None else dist.get_rank(_Groups.tensor_parallel)


def data_parallel_size() -> int:
    """Ranks, or groups of tensor-parallel ranks, that read different data."""
    return dist.get_world_size() // tensor_parallel_size()


def data_parallel_rank() -> int:
    """Which share of the data this rank reads; the same for all tensor-parallel ranks of a group."""
    return dist.get_rank() // tensor_parallel_size()


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`."""

    get_tensor_model_parallel_world_size = get_model_parallel_world_size = staticmethod(tensor_parallel_size)
    get_tensor_model_parallel_rank = get_model_parallel_rank = staticmethod(tensor_parallel_rank)
    get_tensor_model_parallel_group = get_model_parallel_group = staticmethod(tensor_parallel_group)
    get_data_parallel_world_size = staticmethod(data_parallel_size)
    get_data_parallel_rank = staticmethod(data_parallel_rank)

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup | None:
        return _Groups.data_parallel

    @staticmethod
    def get_tensor_model_parallel_src_rank() -> int:
        return dist.get_rank() // tensor_parallel_size() * tensor_parallel_size()
