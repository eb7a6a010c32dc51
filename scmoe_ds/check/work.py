"""What a rank computes and sends: floating-point operations, and bytes by collective, layer and link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from scmoe_ds.compat import (
    efficient_attention,
    efficient_attention_backward,
    flash_attention,
    flash_attention_backward,
)
from scmoe_ds.trace.recorder import Phase, Wait, What

_CAUSAL = {
    flash_attention: 4,
    flash_attention_backward: 11,
    efficient_attention: 6,
    efficient_attention_backward: 11,
}
"""Where these operators are told to leave out the half of the products that a causal mask hides."""
_NAMES = {
    "alltoall_base_": "all-to-all",
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
}


@dataclass(frozen=True)
class Message:
    """Bytes that a rank sends in one collective.

    Attributes:
        collective: its name.
        layer: number of the MoE layer whose rows they are; None: other traffic.
        part: "counts", "dispatch" or "combine" of the layer.
        backward: gradients.
        inside, across: bytes to ranks of the same node, and of others.
    """

    collective: str
    layer: int | None
    part: str
    backward: bool
    inside: float
    across: float


@dataclass
class Work:
    """Of a micro-batch, with what DeepSpeed does at its end."""

    flops: float = 0.0
    messages: list[Message] = field(default_factory=list)

    def sent(self, inside: bool) -> Counter[str]:
        """Bytes by collective."""
        total: Counter[str] = Counter()
        for message in self.messages:
            total[message.collective] += message.inside if inside else message.across  # type: ignore[assignment]
        return total


class WorkCounter(TorchDispatchMode):
    """Inside the block, operators and collectives are counted. It is also a recorder, which tells it of the layers.

    Args:
        per_node: ranks of a node.
        communicated: is told the tensors of each collective.

    Attributes:
        work: since `take`.
    """

    def __init__(self, per_node: int, communicated: Callable[[list[Any]], None]) -> None:
        super().__init__()
        self.per_node, self.communicated = per_node, communicated
        self.work = Work()
        self._exchange: tuple[int | None, str, bool] = (None, "", False)

    def take(self) -> Work:
        """What was counted since the last call."""
        work, self.work = self.work, Work()
        return work

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._communicate(func, args)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            place = _CAUSAL.get(func.overloadpacket)
            causal = place is not None and len(args) > place and args[place]
            self.work.flops += formula(*args, **kwargs, out_val=result) / (2 if causal else 1)
        return result

    def _communicate(self, func: Any, args: Sequence[Any]) -> None:
        tensors = [value for value in tree_iter(list(args)) if isinstance(value, Tensor)]
        self.communicated(tensors)
        kind = _NAMES.get(func.overloadpacket.__name__)
        if kind is None:
            return
        group = next(value for value in args if isinstance(value, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        me = dist.get_rank()
        if ranks != [me]:
            inside, across = _to_links(kind, args, ranks, me, lambda rank: rank // self.per_node == me // self.per_node)
            self.work.messages.append(Message(kind, *self._exchange, inside, across))

    def pair(self, layer: int) -> _LayerRecorder:
        """The recorder of MoE layer number `layer`; see Calibrator.record."""
        return _LayerRecorder(self, layer)

    def exchange(self, layer: int, part: str, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        """Launches an all-to-all of a layer."""
        self._exchange = (layer, part, phase == "backward")
        try:
            return launch()
        finally:
            self._exchange = (None, "", False)


def _to_links(
    kind: str, args: Sequence[Any], ranks: Sequence[int], me: int, is_near: Callable[[int], bool]
) -> tuple[float, float]:
    """Bytes that this rank sends inside its node, and to other nodes.

    All but all-to-alls and sends run in rings. There are as many rings as a node has ranks, and each crosses to the
    next node from another of them.
    """
    if kind == "send":
        size = float(args[0][0].nbytes)
        return (size, 0.0) if is_near(args[2]) else (0.0, size)
    if kind == "all-to-all":
        rows, n = args[1], len(ranks)
        row = rows.nbytes / max(rows.shape[0], 1)
        counts = args[4] or [rows.shape[0] / n] * n
        to_near = sum(count for rank, count in zip(ranks, counts, strict=True) if rank != me and is_near(rank))
        return to_near * row, sum(count for rank, count in zip(ranks, counts, strict=True) if not is_near(rank)) * row
    n, near = len(ranks), sum(map(is_near, ranks))
    sent = args[1] if kind in ("all-gather", "reduce-scatter") else args[0]
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "reduce-scatter": (n - 1) / n}.get(kind, 1)
    size = share * sum(value.nbytes for value in tree_iter(sent) if isinstance(value, Tensor))
    across = size / near if near < n else 0.0
    return size - across, across


@dataclass(frozen=True)
class _LayerRecorder:
    counter: WorkCounter
    layer: int

    def open(self, what: What, *tensors: Tensor | None, chunk: int = 0) -> tuple[Any, ...]:
        return tensors

    close = open

    def watch(self, name: str, chunk: int) -> _ExchangeWatch:
        return _ExchangeWatch(self.counter, self.layer, name)

    def renamed(self, word: str) -> _LayerRecorder:
        return self


@dataclass(frozen=True)
class _ExchangeWatch:
    counter: WorkCounter
    layer: int
    part: str

    def launch(self, phase: Phase, launch: Callable[[], Wait]) -> Wait:
        return self.counter.exchange(self.layer, self.part, phase, launch)
