"""The exchange of row counts that an all-to-all needs beforehand."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.comm.side_stream import side_stream
from scmoe_ds.comm.transport import Transport, Wait
from scmoe_ds.trace.recorder import Watch


class CountsInFlight:
    """Row counts on their way to the other ranks, from them, and on a GPU from there to the host.

    Args:
        sent: the numbers for the other ranks.
        local, received: the numbers for this host; `received` is complete after `wait`.
        wait: waits for the exchange; None: there is none.
    """

    def __init__(self, sent: Tensor, local: Tensor, received: Tensor, wait: Wait | None) -> None:
        # Held until the host knows that the exchange is over. On a GPU `wait` only orders streams and drops the
        # collective's own references. The next small tensor would then get memory that a slower rank has yet to read.
        self._held: tuple[Tensor, ...] = (sent, local, received)
        self._tensors = (local, received)
        self._wait = wait
        self._on_host: torch.cuda.Event | None = None
        if received.is_cuda:
            self._copy_to_host()

    def _copy_to_host(self) -> None:
        # On a side stream: only the host waits for these copies (in `wait`), and the main stream goes on.
        side = side_stream(self._tensors[0].device)
        side.wait_stream(torch.cuda.current_stream(side.device))
        with torch.cuda.stream(side):
            if self._wait is not None:
                self._wait()
            # mypy does not see that the tuple keeps its length.
            self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in self._tensors)  # type: ignore[assignment]
            self._on_host = side.record_event()
        self._wait = None

    def wait(self) -> tuple[list[int], list[int]]:
        """The local numbers, and how many rows each rank sends to each piece of this one."""
        if self._wait is not None:
            self._wait()
        if self._on_host is not None:
            self._on_host.synchronize()
        self._held = ()
        local, received = self._tensors
        return local.tolist(), received.tolist()


def start_counts(
    rows_per_piece: Tensor, transport: Transport, watch: Watch | None = None, local: Tensor | None = None
) -> CountsInFlight:
    """Launches the exchange; not differentiable.

    Args:
        rows_per_piece: [ranks * pieces] int64, how many rows go to each piece of each rank.
        watch: observes the exchange.
        local: int64 numbers that are copied to this rank's host too; default: `rows_per_piece`.
    """
    local = rows_per_piece if local is None else local
    if transport.size == 1:
        return CountsInFlight(rows_per_piece, local, rows_per_piece, None)
    received = torch.empty_like(rows_per_piece)
    sizes = [rows_per_piece.shape[0] // transport.size] * transport.size
    launch = partial(transport.launch, received, rows_per_piece, sizes, sizes)
    wait = launch() if watch is None else watch.launch("forward", launch)
    return CountsInFlight(rows_per_piece, local, received, wait)


def largest(count: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Replaces a count (int64 scalar) by the largest of all ranks, for padded buffers of one size. Blocking."""
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    return count
