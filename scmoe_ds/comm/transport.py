"""How rows move between the ranks of an expert-parallel group: interchangeable primitives, and a probe that picks one.

"collective": `all_to_all_single`, NCCL's and gloo's own. gloo's runs half duplex when ranks enter at different times.
"send_receive": all receives are posted, then all sends; full duplex on a link, one message per pair of ranks.
"hierarchical": inside the nodes, then across; in scmoe_ds.comm.hierarchical, for groups that span nodes, on gloo.

NCCL sends the same messages for "collective" and "send_receive", in one group call.

Every primitive launches at once and takes uneven and zero sizes. All ranks must use the same one: otherwise they wait
for each other forever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.compat import timeout_of
from scmoe_ds.errors import ExchangeError

Wait = Callable[[], object]
METHODS = ("collective", "send_receive")
_LATE_S = 2e-3


@dataclass(frozen=True)
class Transport:
    """A group of ranks, and the primitive by which they exchange rows.

    Attributes:
        group: the ranks; None: this rank alone, nothing is sent.
        method: one of METHODS.
    """

    group: dist.ProcessGroup | None
    method: str = "collective"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f'all-to-all method "{self.method}" must be one of {", ".join(METHODS)}')

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def launch(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """Starts an exchange into `received`. Returns a function that waits for it.

        Args:
            received: [sum(receive), ...], contiguous; filled after the wait.
            rows: [sum(send), ...], contiguous; must stay alive until then.
            receive, send: rows from and to each rank of the group.
        """
        assert self.group is not None
        if self.method != "collective":
            return self._send_receive(received, rows, receive, send)
        with _named(self.group):
            work = dist.all_to_all_single(received, rows, list(receive), list(send), group=self.group, async_op=True)

        def wait() -> None:
            with _named(self.group):
                work.wait()

        return wait

    def _send_receive(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        group = self.group
        assert group is not None
        incoming, outgoing = received.split(list(receive)), rows.split(list(send))
        me = dist.get_rank(group)
        peers = [(rank, dist.get_global_rank(group, rank)) for rank in range(len(send)) if rank != me]
        operations = [dist.P2POp(dist.irecv, incoming[r], peer, group) for r, peer in peers if receive[r]]
        operations += [dist.P2POp(dist.isend, outgoing[r], peer, group) for r, peer in peers if send[r]]
        with _named(group):
            works = dist.batch_isend_irecv(operations) if operations else []
        incoming[me].copy_(outgoing[me])  # while the others are on their way
        # gloo's sends and receives ignore their group's timeout. NCCL's obey it, and block the host if given one here.
        limit = () if rows.is_cuda else (timeout_of(group, rows.device),)

        # NCCL returns one work for all operations, gloo one for each.
        partners: list[int | None] = [operation.peer for operation in operations]
        partners = partners if len(works) == len(partners) else [None] * len(works)

        def wait() -> None:
            for work, partner in zip(works, partners, strict=True):
                with _named(group, partner):
                    work.wait(*limit)

        return wait


@contextmanager
def _named(group: dist.ProcessGroup | None, peer: int | None = None) -> Iterator[None]:
    """Names the ranks of an exchange that fails."""
    try:
        yield
    except RuntimeError as error:
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
        peers = [rank for rank in ranks if rank != me] if peer is None else [peer]
        part = "" if peer is None else f"the part with rank {peer} of "
        raise ExchangeError(f"{part}the all-to-all of expert-parallel ranks", ranks, peers, str(error)) from error


@dataclass(frozen=True)
class Probe:
    """Median milliseconds of one exchange per method, and the message that was exchanged."""

    milliseconds: dict[str, float]
    row_bytes: int
    rows_per_rank: int

    def choice(self, margin: float = 0.0) -> str:
        """The method with the least time. Not "collective" only if that takes longer by more than the margin."""
        fastest = min(self.milliseconds, key=lambda method: self.milliseconds[method])
        collective = self.milliseconds["collective"]
        return fastest if collective > (1 + margin) * self.milliseconds[fastest] else "collective"

    def __str__(self) -> str:
        times = ", ".join(f"{method} {value:.2f} ms" for method, value in self.milliseconds.items())
        return f"{self.rows_per_rank} rows of {self.row_bytes} bytes to each rank: {times}"


def probe(
    transports: Mapping[str, Transport],
    rows_per_rank: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int = 7,
) -> Probe:
    """Times every transport of one group with the message size of a layer. All ranks of the group call it.

    Ranks that compute between exchanges do not enter them together. gloo's collective then runs half duplex. So here
    every other rank comes late, too. The result is the time of the last rank to come, since the others also waited for
    it. All ranks get the same result.
    """
    group = next(iter(transports.values())).group
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    rows = torch.zeros(size * rows_per_rank, hidden_size, dtype=dtype, device=device)
    times: dict[str, list[float]] = {method: [] for method in transports}
    sizes = [rows_per_rank] * size
    for number in range(rounds + 2):
        for method, transport in transports.items():
            dist.barrier(group)
            synchronize(device)
            time.sleep(_LATE_S * ((rank + number) % 2))
            started = time.perf_counter()
            transport.launch(torch.empty_like(rows), rows, sizes, sizes)()
            synchronize(device)
            if number >= 2:  # connections are made at the first use
                times[method].append(1e3 * (time.perf_counter() - started))
    of_last = torch.tensor(list(times.values()), device=device)
    dist.all_reduce(of_last, op=dist.ReduceOp.MIN, group=group)
    milliseconds = dict(zip(times, of_last.median(1).values.tolist(), strict=True))
    return Probe(milliseconds, rows.element_size() * hidden_size, rows_per_rank)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
