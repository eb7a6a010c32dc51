"""An all-to-all in two halves, start and wait, whose backward is the same pair in reverse.

Autograd runs the nodes of a backward pass in the reverse order of their creation. A forward pass

    start(dispatch)   mlp   wait(dispatch)   experts   start(combine)   attention   shared   wait(combine)

therefore runs backward as

    Wait(combine)   shared   attention   Start(combine)   experts   Wait(dispatch)   mlp   Start(dispatch)

so `_Wait.backward` must *launch* the gradient's all-to-all and `_Start.backward` must *wait* for it: the gradient then
travels beside the same operators as the activation did.

Waiting has one meaning here: after `wait`, work that is enqueued on the current device stream may use the tensor.
NCCL's `Work.wait` orders streams and returns at once; gloo's blocks the host.

`torch.distributed` is called directly: `deepspeed.comm` would synchronise the device around every call when its
communication logger is on, and so measure an overlap away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.overlap.transport import Transport, Wait
from scmoe_ds.overlap.wire import pack, unpack


class InFlight:
    """Rows on their way between the ranks of a group. Only `wait` yields the tensor, once."""

    def __init__(self, wait: Callable[[], Tensor]) -> None:
        self._wait: Callable[[], Tensor] | None = wait

    def wait(self) -> Tensor:
        """The received rows, shape [received rows, ...], ready for the current stream.

        Raises:
            RuntimeError: the tensor has been waited for before.
        """
        wait, self._wait = self._wait, None
        if wait is None:
            raise RuntimeError("this all-to-all has been waited for already; its tensor was handed out then")
        return wait()


def start(
    rows: Tensor,
    transport: Transport,
    send_rows: Sequence[int] | None = None,
    receive_rows: Sequence[int] | None = None,
    blocking: bool = False,
    wire_dtype: str | None = None,
) -> InFlight:
    """Launches an all-to-all of rows and returns at once.

    Args:
        rows: [sent rows, D], floating point; consecutive pieces go to consecutive ranks.
        transport: the ranks and the primitive; a world of one sends nothing and gives `rows` back.
        send_rows: how many rows each rank gets; default: equal pieces.
        receive_rows: how many rows come from each rank; default: equal pieces.
        blocking: wait at once, forward and backward (the reference without overlap).
        wire_dtype: None, or a number format of scmoe_ds.overlap.wire for rows and their gradients on the wire.
    """
    if transport.size == 1:
        return InFlight(lambda: rows)
    equal = [rows.shape[0] // transport.size] * transport.size
    transfer = _Transfer(transport, send_rows or equal, receive_rows or equal, blocking, wire_dtype)
    token = _Start.apply(rows, transfer)
    return InFlight(lambda: _Wait.apply(token, transfer))


def start_counts(rows_per_piece: Tensor, transport: Transport) -> InFlight:
    """Launches the exchange of row counts that an uneven all-to-all needs beforehand; not differentiable.

    Args:
        rows_per_piece: [ranks * pieces] int64, how many rows go to each piece of each rank.

    Returns:
        In flight: [ranks * pieces] int64, how many rows come from each rank for each piece of this one.
    """
    if transport.size == 1:
        return InFlight(lambda: rows_per_piece)
    sizes = [rows_per_piece.shape[0] // transport.size] * transport.size
    transfer = _Transfer(transport, sizes, sizes, blocking=False, wire_dtype=None)
    transfer.launch(rows_per_piece)
    return InFlight(transfer.finish)


class _Transfer:
    """What the start and the wait of one all-to-all share: the transport, the sizes, and the rows in flight."""

    def __init__(
        self,
        transport: Transport,
        send: Sequence[int],
        receive: Sequence[int],
        blocking: bool,
        wire_dtype: str | None,
    ) -> None:
        self.transport, self.send, self.receive = transport, send, receive
        self.blocking, self.wire_dtype = blocking, wire_dtype
        self._in_flight: tuple[Wait | None, Tensor, Tensor, torch.dtype] | None = None

    def launch(self, rows: Tensor, reverse: bool = False) -> None:
        send, receive = (self.receive, self.send) if reverse else (self.send, self.receive)
        packed = pack(rows, self.wire_dtype).contiguous()
        received = packed.new_empty((sum(receive), *packed.shape[1:]))
        wait: Wait | None = self.transport.launch(received, packed, receive, send)
        if self.blocking and wait is not None:
            wait()
            wait = None  # a second wait on one of gloo's receives never returns
        # Both buffers are held until the wait: the caching allocator could otherwise give their memory to work
        # that is enqueued on the compute stream before the transfer has read or written it.
        self._in_flight = (wait, packed, received, rows.dtype)

    def finish(self) -> Tensor:
        assert self._in_flight is not None, "an all-to-all is waited for without having been launched"
        wait, _, received, dtype = self._in_flight
        self._in_flight = None
        if wait is not None:
            wait()
        return unpack(received, self.wire_dtype, dtype)


class _Start(torch.autograd.Function):
    """Returns an empty token that ties the wait to the start in autograd's graph; the rows stay in the transfer,
    so that nobody can read a buffer that is still being filled."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.launch(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.set_materialize_grads(True)  # an unused output still owes the other ranks its share of the collective
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch(grads[0], reverse=True)
        return grads[0].new_empty(0), None
