"""All-to-all, all-reduce, reduce-scatter and all-gather by size, between ranks of one node and of several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.comm.counts import start_counts
from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.planner.rounds import Reduction
from scmoe_ds.probe.clock import ColdClock
from scmoe_ds.probe.groups import Exchanging
from scmoe_ds.probe.trials import Ladder, Sent, Trial

LATE_S = 2e-3
"""Ranks that compute in between do not enter a collective together; every other one comes this much later."""

Call = Callable[[], object]
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the names from torch 2.13 on
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchanges(clock: ColdClock, between: Exchanging, sizes: Sequence[int]) -> Iterator[Ladder]:
    """All collectives of some groups.

    Args:
        sizes: bytes, rising.
    """
    reduce = last_to_come(between.members)
    for collective, method, make in [
        *(("all-to-all", method, all_to_all(method)) for method in METHODS),
        ("all-reduce", "", _all_reduce),
        ("reduce-scatter", "", _reduce_scatter),
        ("all-gather", "", _all_gather),
        ("counts", "", _counts),
    ]:
        steps = [1024 * between.ranks] if collective == "counts" else sizes
        yield [
            Trial(
                Sent(collective, method, between.ranks, between.nodes, _divisible(size, between.ranks)),
                _sample(clock, between, make, _divisible(size, between.ranks)),
                reduce,
            )
            for size in steps
        ]


def last_to_come(members: Sequence[Sequence[int]]) -> Reduction:
    """The slowest group's time, of its rank that came last: the others also waited for that one."""
    return lambda values: max(min(values[rank] for rank in ranks) for ranks in members)


def all_to_all(method: str) -> Callable[[Tensor, dist.ProcessGroup], Call]:
    """An all-to-all of a tensor [numbers] by a method of `comm.transport`."""

    def make(tensor: Tensor, group: dist.ProcessGroup) -> Call:
        transport = Transport(group, method)
        rows = tensor.view(transport.size, -1)
        received, sizes = torch.empty_like(rows), [1] * transport.size
        return lambda: transport.launch(received, rows, sizes, sizes)()

    return make


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Call:
    return lambda: dist.all_reduce(tensor, group=group)


def _reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Call:
    part = torch.empty_like(tensor.view(dist.get_world_size(group), -1)[0])
    return lambda: _scatter(part, tensor, group=group)


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Call:
    part = torch.empty_like(tensor.view(dist.get_world_size(group), -1)[0])
    return lambda: _gather(tensor, part, group=group)


def _counts(tensor: Tensor, group: dist.ProcessGroup) -> Call:
    """The exchange of row counts, until the host has them."""
    counts = tensor.view(torch.int64)
    return lambda: start_counts(counts, Transport(group)).wait()


def _sample(
    clock: ColdClock, between: Exchanging, make: Callable[[Tensor, dist.ProcessGroup], Call], nbytes: int
) -> Callable[[], float]:
    number = 0

    def sample() -> float:
        nonlocal number
        number += 1
        call: Call | None = None
        if between.group is not None:
            call = make(torch.zeros(nbytes // 4, device=clock.device), between.group)
        clock.synchronize()
        dist.barrier()
        if call is None:
            return 0.0
        time.sleep(LATE_S * ((dist.get_rank() + number) % 2))
        return clock.host(call)

    return sample


def _divisible(nbytes: int, ranks: int) -> int:
    """The next size that every rank gets as many numbers of 8 bytes of."""
    return -(-nbytes // (8 * ranks)) * 8 * ranks
