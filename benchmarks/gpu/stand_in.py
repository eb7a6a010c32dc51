"""A transfer that stands in for the all-to-all where there is one card: device → pinned host memory → device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.profiler import record_function

from scmoe_ds.comm.transport import Transport, Wait

RANGE = "stand-in transfer"
"""The name of its launches in a trace."""


class _Lane:
    """A stream of its own, as a group has with NCCL, and host memory for what passes through."""

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        self._host = torch.empty(0, dtype=torch.uint8)

    def host(self, like: Tensor) -> Tensor:
        """Pinned memory of the tensor's shape. One is enough: what uses it follows each other on one stream."""
        if self._host.numel() < like.nbytes:
            if self.stream is not None:
                self.stream.synchronize()  # only while it grows: copies may still use the old one
            self._host = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=like.is_cuda)
        return self._host[: like.nbytes].view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class StandIn(Transport):
    """One rank that behaves as if there were two: rows leave the device and come back, in the same order.

    Counts, streams, events and buffers are those of a real transfer. Only the way is another one.

    Attributes:
        share: of the rows, how many take the way over the host. The rest are copied on the device, as a rank's rows
            for itself are.
    """

    share: float = 1.0
    lane: _Lane = field(default_factory=_Lane, compare=False)

    @property
    def size(self) -> int:
        """The layer sends if there are other ranks."""
        return 2

    def with_share(self, share: float) -> StandIn:
        """The same way for another share of the rows."""
        return replace(self, share=share)

    def launch(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """As `Transport.launch`; the sizes are those of the tensors."""
        far = round(self.share * rows.shape[0])
        if not rows.is_cuda:
            with record_function(RANGE):
                received.copy_(rows)
            return lambda: None
        stream = self.lane.stream = self.lane.stream or torch.cuda.Stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream), record_function(RANGE):
            if far:
                host = self.lane.host(rows[:far])
                host.copy_(rows[:far], non_blocking=True)
                received[:far].copy_(host, non_blocking=True)
            received[far:].copy_(rows[far:])
            arrived = stream.record_event()
        return lambda: torch.cuda.current_stream(rows.device).wait_event(arrived)


def use(layers: Sequence[object], share: float = 1.0) -> StandIn:
    """Gives MoE layers of a world of one the stand-in transfer, all of them the same lane; returns it."""
    stand_in = StandIn(None, share=share)
    for layer in layers:
        layer.transport = stand_in  # type: ignore[attr-defined]
    return stand_in
