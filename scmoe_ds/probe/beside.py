"""How much slower computation is beside a running all-to-all.

A transfer takes multiprocessors of a GPU, and processor time where the host sends (gloo). It is launched, products of
half as much again run beside it, and it is waited for. What all of it takes longer than the products alone is time that
the transfer took from them:

    factor = transfer / (transfer − time that it took)

A sample is that time's share of the transfer's. Differences are noisy: shares below zero count, too, or what is left of
the noise would look like a slow-down; and the mean of all ranks counts, not the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.planner.rounds import Reduction
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.groups import Exchanging
from scmoe_ds.probe.trials import Beside, Ladder, Trial

SIDES = {"cpu": (256, 512), "cuda": (2048, 2048)}
"""Rows and width of the products: on a GPU so large that their launches take less time than they."""
LONGER = 1.5
"""Products take so many times as long as the transfer, which may itself be slower beside them."""
PIECES = 4
MOST_TAKEN = 0.95
"""A transfer that leaves less than a twentieth of the time is none to compute beside."""


def slowdowns(bench: Bench, between: Exchanging) -> Iterator[Ladder]:
    """By method and size."""
    for method in METHODS:
        yield [
            Trial(
                Beside(method, between.ranks, between.nodes, size),
                _sample(bench, between, method, size),
                mean_of(between.members),
                PIECES,
            )
            for size in bench.sizes.beside
        ]


def mean_of(members: Sequence[Sequence[int]]) -> Reduction:
    """Over all ranks that exchange."""
    return lambda values: statistics.mean(values[rank] for ranks in members for rank in ranks)


def _sample(bench: Bench, between: Exchanging, method: str, nbytes: int) -> Callable[[], float]:
    products = 0

    def sample() -> float:
        nonlocal products
        group, clock = between.group, bench.clock
        height, width = SIDES[bench.device.type]
        left, right = bench.take("rows", height, width), bench.take("weight", width, width)
        transport = Transport(group, method)
        rows = torch.zeros(transport.size, -(-nbytes // (4 * transport.size)), device=bench.device)
        received, sizes = torch.empty_like(rows), [1] * transport.size

        def compute() -> None:
            for _ in range(products):
                torch.mm(left, right)

        def launch() -> Callable[[], object]:
            return transport.launch(received, rows, sizes, sizes) if group is not None else lambda: None

        def together() -> None:
            wait = launch()
            compute()
            wait()

        dist.barrier()
        transfer_ms = clock.host(lambda: launch()())
        if not products:  # the same number on every rank, and in every round
            products = 8
            one_ms = min(gather(clock.host(compute))) / products
            products = max(1, round(LONGER * max(gather(transfer_ms)) / one_ms))
        alone_ms = clock.host(compute)
        dist.barrier()
        return (clock.host(together) - alone_ms) / transfer_ms if group else 0.0

    return sample


def factor_of(taken: float) -> float:
    """The slow-down of computation beside a transfer that takes this share of its own time from it."""
    return 1 / (1 - min(max(taken, 0.0), MOST_TAKEN))
