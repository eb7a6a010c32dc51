"""Linear layers and embeddings that tensor-parallel ranks share: megatron-core's, or torch's where there are no others.

Either way a parameter has the same name and carries its rule (scmoe_ds.parallel.tensor.Split), so that initialisation
and checkpoints need not know on how many ranks a model runs.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.comm.gather import gather_last_dimension
from scmoe_ds.compat import forget_load_hooks
from scmoe_ds.parallel.tensor import Split, mark_tensor_parallel

Group: TypeAlias = "dist.ProcessGroup | None"


class Weighted(Protocol):
    """What torch's layers and megatron-core's have in common."""

    @property
    def weight(self) -> Tensor: ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


def size_of(group: Group) -> int:
    """Tensor-parallel ranks; None is a rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def column_parallel(inputs: int, sections: Sequence[int], bias: bool, group: Group) -> Weighted:
    """[..., inputs] → [..., sum(sections) / ranks]: each rank has its piece of each section of the output.

    Args:
        inputs: size of the input, which all ranks hold whole.
        sections: output sizes that are divided separately, such as those of query, key and value heads.
        bias: whether there is one; divided alike.
        group: the ranks.
    """
    layer: nn.Linear | Any
    if group is None:
        layer = nn.Linear(inputs, sum(sections), bias=bias)
    else:
        layer = _classes()[0](inputs, sum(sections), bias=bias, config=_config(), init_method=_no_init, tp_group=group)
    for parameter in layer.parameters():
        mark_tensor_parallel(parameter, Split(0, tuple(sections)), group is not None)
    return layer


def row_parallel(inputs: int, outputs: int, bias: bool, group: Group) -> Weighted:
    """[..., inputs / ranks] → [..., outputs], summed over the ranks; the bias is whole on each of them."""
    layer: Weighted
    if group is None:
        layer = nn.Linear(inputs, outputs, bias=bias)
    else:
        layer = _classes()[1](
            inputs,
            outputs,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            config=_config(),
            init_method=_no_init,
            tp_group=group,
        )
    mark_tensor_parallel(layer.weight, Split(1, (inputs,)), group is not None)
    return layer


def vocabulary_embedding(vocab_size: int, hidden_size: int, group: Group) -> Weighted:
    """[B, S] int64 → [B, S, D]: each rank has a range of the vocabulary."""
    layer: Weighted
    if group is None:
        layer = nn.Embedding(vocab_size, hidden_size)
    else:
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        layer = VocabParallelEmbedding(vocab_size, hidden_size, init_method=_no_init, config=_config(), tp_group=group)
    mark_tensor_parallel(layer.weight, Split(0, (vocab_size,)), group is not None)
    return layer


def vocabulary_logits(hidden_BSD: Tensor, weight_VD: Tensor, group: Group) -> Tensor:
    """[B, S, V / ranks]: the logits of this rank's range of the vocabulary."""
    if group is None:
        return F.linear(hidden_BSD, weight_VD)
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    return linear(
        hidden_BSD,
        weight_VD,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=True,
        sequence_parallel=False,
        tp_group=group,
    )


def vocabulary_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, group: Group) -> Tensor:
    """Cross entropy of every token in fp32, [B, S], from the logits of all ranks."""
    if group is None:
        losses = F.cross_entropy(logits_BSV.flatten(0, -2).float(), labels_BS.flatten(), reduction="none")
        return losses.view(labels_BS.shape)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_BSV.float(), labels_BS)


def gather_vocabulary(logits_BSV: Tensor, group: Group) -> Tensor:
    """The logits of the whole vocabulary on every rank, [B, S, V]."""
    return logits_BSV if group is None else gather_last_dimension(logits_BSV, group)


@contextmanager
def own_random_numbers(group: Group, device: torch.device) -> Iterator[None]:
    """Random numbers that differ between tensor-parallel ranks, for dropout on what is divided between them.

    Outside of it the generators of all ranks stay in step: what they all hold must be dropped alike.
    """
    if group is None:
        yield
        return
    seed = int(torch.randint(2**62, ()).item())  # the same on all ranks
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + dist.get_rank(group))
        yield


def _no_init(_: Tensor) -> None:
    """megatron-core wants a function; the model is initialised as a whole, see initialization.py."""


@dataclass(frozen=True)
class _NotCopied:
    """A process group inside of a module that DeepSpeed deep-copies (one per routed expert)."""

    group: Any

    def __deepcopy__(self, memo: object) -> _NotCopied:
        return self


@cache
def _config() -> Any:
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    linear.warned = True  # that CUDA_DEVICE_MAX_CONNECTIONS should be 1: with it nothing of an MoE would overlap
    return ModelParallelConfig(use_cpu_initialization=True, perform_initialization=False)


@cache
def _classes() -> tuple[Any, Any]:
    """megatron-core's linear layers with plain modules' manners; made late, for it takes seconds to import."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    class _Plain:
        """Returns a tensor, not a pair with a bias that was skipped; keeps no extra state; can be deep-copied."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            forget_load_hooks(self)  # type: ignore[arg-type]  # a mixin of modules

        @property
        def tp_group(self) -> dist.ProcessGroup:
            return self.__dict__["_ranks"].group

        @tp_group.setter
        def tp_group(self, group: dist.ProcessGroup) -> None:
            self.__dict__["_ranks"] = _NotCopied(group)

        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows)[0]  # type: ignore[misc]  # beside it, megatron-core's layer has one

        get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    class ColumnParallel(_Plain, ColumnParallelLinear):
        pass

    class RowParallel(_Plain, RowParallelLinear):
        pass

    return ColumnParallel, RowParallel
