"""An all-to-all in two halves, start and wait, whose backward is the same pair in reverse.

Autograd runs the nodes of a backward pass in the reverse order of their creation. A forward pass

    start(dispatch)   mlp   wait(dispatch)   experts   start(combine)   attention   shared   wait(combine)

therefore runs backward as

    Wait(combine)   shared   attention   Start(combine)   experts   Wait(dispatch)   mlp   Start(dispatch)

So `_Wait.backward` must *launch* the gradient's all-to-all, and `_Start.backward` must *wait* for it. Then the gradient
is on its way during the same operators as the activation was.

Waiting has one meaning here: after `wait`, work that is enqueued on the current device stream may use the tensor.
NCCL's `Work.wait` orders streams and returns at once; gloo's blocks the host.

`torch.distributed` is called directly. When the communication logger of `deepspeed.comm` is on, it synchronises the
device around every call, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.comm.side_stream import side_stream
from scmoe_ds.comm.transport import Transport, Wait
from scmoe_ds.comm.wire import pack, unpack
from scmoe_ds.trace.recorder import Phase, Watch


@dataclass(frozen=True)
class SplitSizes:
    """How many rows an exchange sends to and receives from each rank; the same for the way back.

    Attributes:
        send, receive: rows to and from each rank of the group.
        picked: which of this rank's rows are sent, in order; None: all of them.
        send_back, receive_back, picked_back: the same for the way back (the gradients, or the combine).
    """

    send: Sequence[int]
    receive: Sequence[int]
    send_back: Sequence[int]
    receive_back: Sequence[int]
    picked: Sequence[slice] | None = None
    picked_back: Sequence[slice] | None = None

    @classmethod
    def plain(cls, send: Sequence[int], receive: Sequence[int]) -> SplitSizes:
        """All rows are sent, consecutive pieces to consecutive ranks, and the same ones come back."""
        return cls(send, receive, receive, send)

    @property
    def rows(self) -> int:
        """This rank's rows before the exchange, and after the way back."""
        return sum(self.receive_back)

    def reversed(self) -> SplitSizes:
        """The way back as an exchange of its own: the combine of a dispatch."""
        return SplitSizes(self.send_back, self.receive_back, self.send, self.receive, self.picked_back, self.picked)


class InFlight:
    """Rows on their way between the ranks of a group. `send` may come later. Only `wait` yields the tensor, once."""

    def __init__(self, transfer: _Transfer | None, token: Tensor) -> None:
        self._transfer = transfer
        self._token: Tensor | None = token

    def send(self, sizes: SplitSizes, first_row: int = 0) -> None:
        """Launches a prepared all-to-all; see `prepare`.

        Args:
            sizes: how many rows go where.
            first_row: where this chunk begins among the prepared rows.
        """
        if self._transfer is not None:
            self._transfer.launch_held(sizes, first_row)
        elif self._token is not None and self._token.shape[0] != sizes.rows:
            self._token = self._token[first_row : first_row + sizes.rows]

    def wait(self) -> Tensor:
        """The received rows, [received rows, D], ready for the current stream.

        Raises:
            RuntimeError: the tensor has been waited for before.
        """
        token, self._token = self._token, None
        if token is None:
            raise RuntimeError("this all-to-all has been waited for already; its tensor was handed out then")
        if self._transfer is None:
            return token
        return _Wait.apply(token, self._transfer) if torch.is_grad_enabled() else self._transfer.finish()


def prepare(
    rows: Tensor,
    transport: Transport,
    blocking: bool = False,
    wire_dtype: str | None = None,
    watches: Sequence[Watch | None] = (None,),
    deferred: bool = False,
) -> list[InFlight]:
    """Prepares an all-to-all for each of several consecutive chunks of rows. `InFlight.send` launches it.

    The host need not know the sizes of the chunks yet. In the backward pass the gradients of all chunks are waited for
    where this call stands, not where `send` does.

    Args:
        rows: [N, D], floating point, chunk after chunk. Rows behind the last chunk are not sent (dropped choices).
        transport: the ranks and the primitive. One rank alone sends nothing and gets `rows` back.
        blocking: wait at once, forward and backward (the reference without overlap).
        wire_dtype: None, or a number format of scmoe_ds.comm.wire for rows and their gradients on the wire.
        watches: an observer or None for each chunk.
        deferred: other work is enqueued before `send`, for which the launch on a GPU then does not wait.
    """
    if transport.size == 1:
        return [InFlight(None, rows) for _ in watches]
    transfers = [_Transfer(transport, blocking, wire_dtype, watch, deferred) for watch in watches]
    tokens = _Start.apply(rows, transfers) if torch.is_grad_enabled() else _hold(rows, transfers)
    return [InFlight(transfer, token) for transfer, token in zip(transfers, tokens, strict=True)]


def start(
    rows: Tensor,
    transport: Transport,
    sizes: SplitSizes | None = None,
    blocking: bool = False,
    wire_dtype: str | None = None,
    watch: Watch | None = None,
) -> InFlight:
    """Launches an all-to-all of rows and returns at once: `prepare` and `send`. By default in equal pieces."""
    (flight,) = prepare(rows, transport, blocking, wire_dtype, [watch])
    equal = [rows.shape[0] // transport.size] * transport.size
    flight.send(sizes or SplitSizes.plain(equal, equal))
    return flight


class _Transfer:
    """What the start and the wait of one all-to-all share: the transport, the sizes, and the rows in flight."""

    def __init__(
        self, transport: Transport, blocking: bool, wire_dtype: str | None, watch: Watch | None, deferred: bool
    ) -> None:
        self.transport, self.blocking, self.wire_dtype, self.watch = transport, blocking, wire_dtype, watch
        self.deferred, self.sizes, self.first_row = deferred, SplitSizes.plain((), ()), 0
        self.gradient: _Gradient | None = None
        self._held: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._in_flight: tuple[Wait | None, Tensor, Tensor, torch.dtype] | None = None
        self._stream: torch.cuda.Stream | None = None  # that it was launched from

    def hold(self, rows: Tensor) -> None:
        ready = torch.cuda.current_stream(rows.device).record_event() if self.deferred and rows.is_cuda else None
        self._held = (rows.detach(), ready)

    def launch_held(self, sizes: SplitSizes, first_row: int) -> None:
        assert self._held is not None, "an all-to-all was sent twice"
        (rows, ready), self._held = self._held, None
        self.sizes, self.first_row = sizes, first_row
        rows = rows[first_row : first_row + sizes.rows]
        if ready is None:
            self._launch(rows, sizes, "forward")
            return
        # The collective waits for the stream that it is launched from. Since `hold` the main stream has gone on with
        # the backbone. From the side stream the collective waits for the rows alone.
        side = side_stream(rows.device)
        side.wait_event(ready)
        rows.record_stream(side)  # `pack` reads them there, perhaps after their last reference has gone
        with torch.cuda.stream(side):
            self._launch(rows, sizes, "forward")

    def launch_gradient(self, grad: Tensor) -> None:
        assert self.gradient is not None
        place = self.gradient.place(grad, self.first_row, self.sizes.rows) if self.wire_dtype is None else None
        self._launch(grad, self.sizes.reversed(), "backward", place)

    @torch.no_grad()  # a deferred launch runs outside of autograd's functions
    def _launch(self, rows: Tensor, sizes: SplitSizes, phase: Phase, received: Tensor | None = None) -> None:
        if sizes.picked is not None:
            rows = torch.cat([rows[piece] for piece in sizes.picked])
        packed = pack(rows, self.wire_dtype).contiguous()
        if received is None:
            received = packed.new_empty((sum(sizes.receive), *packed.shape[1:]))
        launch = partial(self.transport.launch, received, packed, sizes.receive, sizes.send)
        wait: Wait | None = launch() if self.watch is None else self.watch.launch(phase, launch)
        if self.blocking and wait is not None:
            wait()
            wait = None  # a second wait on one of gloo's receives never returns
        # Both buffers are held until the wait. Otherwise the caching allocator could give their memory to work that is
        # enqueued on the compute stream before the transfer has read or written it.
        self._in_flight = (wait, packed, received, rows.dtype)
        self._stream = torch.cuda.current_stream(received.device) if received.is_cuda else None

    def finish(self) -> Tensor:
        assert self._in_flight is not None, "an all-to-all is waited for without having been sent"
        wait, packed, received, dtype = self._in_flight
        self._in_flight = None
        if wait is not None:
            wait()
        if self._stream is not None and self._stream != (current := torch.cuda.current_stream(received.device)):
            current.wait_stream(self._stream)  # the launch put work there, too: a rank's rows to itself
            # The buffers belong to that stream. The host passes the wait long before the transfer ends. If they were
            # freed now, that stream could reuse them. The current stream waits for the transfer.
            for buffer in (packed, received):
                buffer.record_stream(current)
        return unpack(received, self.wire_dtype, dtype)


class _Gradient:
    """The gradient of prepared rows. Each chunk's transfer receives its part in place, and nothing is put together."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._whole: Tensor | None = None

    def place(self, like: Tensor, first_row: int, rows: int) -> Tensor:
        if self._whole is None:
            self._whole = like.new_empty(self.rows, *like.shape[1:])
        return self._whole[first_row : first_row + rows]

    def take(self, parts: Sequence[Tensor]) -> Tensor:
        """Of all rows; zero for those that were not sent."""
        whole, self._whole = self._whole, None
        sent = sum(part.shape[0] for part in parts)
        if whole is None:  # the wire has another number format
            stayed = [parts[0].new_zeros(self.rows - sent, *parts[0].shape[1:])] * (sent < self.rows)
            return torch.cat([*parts, *stayed]) if len(parts) > 1 or stayed else parts[0]
        if sent < self.rows:
            whole[sent:].zero_()
        return whole


def _hold(rows: Tensor, transfers: Sequence[_Transfer]) -> tuple[Tensor, ...]:
    for transfer in transfers:
        transfer.hold(rows)
    return tuple(rows.new_empty(0) for _ in transfers)


class _Start(torch.autograd.Function):
    """Returns an empty token per chunk, which ties the wait to the start in autograd's graph. The rows stay in the
    transfers. So nobody can read a buffer that is still being filled."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfers: Sequence[_Transfer]) -> tuple[Tensor, ...]:
        ctx.transfers, ctx.gradient = transfers, _Gradient(rows.shape[0])
        for transfer in transfers:
            transfer.gradient = ctx.gradient
        return _hold(rows, transfers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.take([transfer.finish() for transfer in ctx.transfers]), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.set_materialize_grads(True)  # the other ranks wait for the gradient of an unused output too
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch_gradient(grads[0])
        return grads[0].new_empty(0), None
