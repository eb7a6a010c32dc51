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
    """The sizes of an exchange, and of the one that carries its gradients back.

    Attributes:
        send, receive: rows to and from each rank of the group.
        picked: which of the rows at hand go out, in order; None: all of them.
        send_back, receive_back, picked_back: the same for the way back.
    """

    send: Sequence[int]
    receive: Sequence[int]
    send_back: Sequence[int]
    receive_back: Sequence[int]
    picked: Sequence[slice] | None = None
    picked_back: Sequence[slice] | None = None

    @classmethod
    def plain(cls, send: Sequence[int], receive: Sequence[int]) -> SplitSizes:
        """All rows go out, consecutive pieces to consecutive ranks, and the same ones come back."""
        return cls(send, receive, receive, send)

    @property
    def rows(self) -> int:
        """Rows at hand before the exchange, or after the way back."""
        return sum(self.receive_back)

    def reversed(self) -> SplitSizes:
        """The way back as an exchange of its own: a combine, where this is the dispatch."""
        return SplitSizes(self.send_back, self.receive_back, self.send, self.receive, self.picked_back, self.picked)


class InFlight:
    """Rows on their way between the ranks of a group. `send` may be left to a later moment; only `wait` yields the
    tensor, once."""

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
) -> list[InFlight]:
    """All-to-alls of consecutive chunks of rows whose sizes are not known on the host yet; `InFlight.send` launches
    each.

    Their place in the backward pass is decided here, not at `send`: the wait for all chunks' gradients comes where
    this call stands.

    Args:
        rows: [N, D], floating point; chunk by chunk. The chunks together may take fewer than N rows, the last ones then
            stay (dropped choices that were sorted behind all others).
        transport: the ranks and the primitive; a world of one sends nothing and gives `rows` back.
        blocking: wait at once, forward and backward (the reference without overlap).
        wire_dtype: None, or a number format of scmoe_ds.comm.wire for rows and their gradients on the wire.
        watches: an observer or None for each chunk; as many chunks are made.
    """
    if transport.size == 1:
        return [InFlight(None, rows) for _ in watches]
    transfers = [_Transfer(transport, blocking, wire_dtype, watch) for watch in watches]
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
    """Launches an all-to-all of rows and returns at once: `prepare` and `send`; equal pieces by default."""
    (flight,) = prepare(rows, transport, blocking, wire_dtype, [watch])
    equal = [rows.shape[0] // transport.size] * transport.size
    flight.send(sizes or SplitSizes.plain(equal, equal))
    return flight


class _Transfer:
    """What the start and the wait of one all-to-all share: the transport, the sizes, and the rows in flight."""

    def __init__(self, transport: Transport, blocking: bool, wire_dtype: str | None, watch: Watch | None) -> None:
        self.transport, self.blocking, self.wire_dtype, self.watch = transport, blocking, wire_dtype, watch
        self.sizes = SplitSizes.plain((), ())
        self._held: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._in_flight: tuple[Wait | None, Tensor, Tensor, torch.dtype] | None = None
        self._launched: torch.cuda.Event | None = None

    def hold(self, rows: Tensor) -> None:
        ready = torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None
        self._held = (rows.detach(), ready)

    def launch_held(self, sizes: SplitSizes, first_row: int) -> None:
        assert self._held is not None, "an all-to-all was sent twice"
        (rows, ready), self._held = self._held, None
        self.sizes = sizes
        rows = rows[first_row : first_row + sizes.rows]
        if ready is None or self.blocking:  # blocking: the main stream itself waits
            self._launch(rows, sizes, "forward")
            return
        # The collective waits for the stream that it is launched from. The main stream has gone on with the backbone
        # since `hold`; from the side stream the rows are all that it waits for.
        side = side_stream(rows.device)
        side.wait_event(ready)
        rows.record_stream(side)  # a wire format reads them there, after their last reference may have gone
        with torch.cuda.stream(side):
            self._launch(rows, sizes, "forward")

    def launch_gradient(self, grad: Tensor) -> None:
        self._launch(grad, self.sizes.reversed(), "backward")

    @torch.no_grad()  # a deferred launch runs outside of autograd's functions
    def _launch(self, rows: Tensor, sizes: SplitSizes, phase: Phase) -> None:
        if sizes.picked is not None:
            rows = torch.cat([rows[piece] for piece in sizes.picked])
        packed = pack(rows, self.wire_dtype).contiguous()
        received = packed.new_empty((sum(sizes.receive), *packed.shape[1:]))
        launch = partial(self.transport.launch, received, packed, sizes.receive, sizes.send)
        wait: Wait | None = launch() if self.watch is None else self.watch.launch(phase, launch)
        if self.blocking and wait is not None:
            wait()
            wait = None  # a second wait on one of gloo's receives never returns
        # Both buffers are held until the wait: the caching allocator could otherwise give their memory to work
        # that is enqueued on the compute stream before the transfer has read or written it.
        self._in_flight = (wait, packed, received, rows.dtype)
        if received.is_cuda:
            # What the launch itself put on its stream: a rank's rows to itself, and the wait of a blocking transfer.
            self._launched = torch.cuda.current_stream(received.device).record_event()

    def finish(self) -> Tensor:
        assert self._in_flight is not None, "an all-to-all is waited for without having been sent"
        wait, packed, received, dtype = self._in_flight
        self._in_flight = None
        if wait is not None:
            wait()
        if self._launched is not None:
            torch.cuda.current_stream(received.device).wait_event(self._launched)
            # Buffers of a deferred launch belong to the side stream. The host is past the wait long before the
            # transfer is; freed now, they could be reused there. The current stream comes after the transfer.
            for buffer in (packed, received):
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        return unpack(received, self.wire_dtype, dtype)


def _hold(rows: Tensor, transfers: Sequence[_Transfer]) -> tuple[Tensor, ...]:
    for transfer in transfers:
        transfer.hold(rows)
    return tuple(rows.new_empty(0) for _ in transfers)


class _Start(torch.autograd.Function):
    """Returns an empty token per chunk that ties the wait to the start in autograd's graph; the rows stay in the
    transfers, so that nobody can read a buffer that is still being filled."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfers: Sequence[_Transfer]) -> tuple[Tensor, ...]:
        ctx.transfers, ctx.rows = transfers, rows.shape[0]
        return _hold(rows, transfers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = [transfer.finish() for transfer in ctx.transfers]
        stayed = ctx.rows - sum(part.shape[0] for part in parts)
        if stayed:
            parts.append(parts[0].new_zeros(stayed, *parts[0].shape[1:]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.set_materialize_grads(True)  # an unused output still owes the other ranks its share of the collective
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.launch_gradient(grads[0])
        return grads[0].new_empty(0), None
