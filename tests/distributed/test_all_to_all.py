"""The start/wait pair: what arrives, and gradients against finite differences over all ranks (fp64)."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds.comm.all_to_all import SplitSizes, start
from scmoe_ds.comm.counts import start_counts
from scmoe_ds.comm.hierarchical import make_transports, ranks_by_node
from scmoe_ds.comm.transport import METHODS, Transport

# SPLITS[i][j]: rows that rank i sends to rank j; rank 1 sends nothing at all, rank 0 keeps nothing.
SPLITS = {
    2: [[0, 3], [0, 0]],
    3: [[0, 2, 1], [0, 0, 0], [1, 0, 2]],
    4: [[0, 2, 1, 3], [0, 0, 0, 0], [1, 0, 2, 0], [4, 1, 0, 1]],
}


def row_sizes(ranks: int, rank: int) -> tuple[list[int], list[int]]:
    return SPLITS[ranks][rank], [row[rank] for row in SPLITS[ranks]]


def exchange(
    rows: Tensor, sizes: tuple[list[int], list[int]] | tuple[None, None], blocking: bool, method: str
) -> Tensor:
    return start(rows, transport_of(method), SplitSizes.plain(*sizes) if sizes[0] else None, blocking=blocking).wait()


def global_loss(rows: Tensor, sizes: tuple, blocking: bool, method: str) -> Tensor:
    """A sum over ranks of a function that treats every received element differently."""
    received = exchange(rows, sizes, blocking, method)
    weight = torch.arange(received.numel(), dtype=torch.float64).view_as(received) + 1 + dist.get_rank()
    return (received**3 * weight).sum()


def arrivals(uneven: bool, method: str) -> bool:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = row_sizes(ranks, rank) if uneven else (None, None)
    send = sizes[0] or [2] * ranks
    # Element = sender, receiver, position: nothing can be mistaken for anything else.
    rows = torch.tensor([[100.0 * rank + 10 * to + i] for to, count in enumerate(send) for i in range(count)])
    received = exchange(rows.reshape(-1, 1), sizes, False, method)
    counts = sizes[1] or [2] * ranks
    expected = [[100.0 * source + 10 * rank + i] for source, count in enumerate(counts) for i in range(count)]
    assert received.tolist() == expected
    assert start_counts(torch.tensor(send), transport_of(method)).wait() == (send, counts)
    return True


def gradients(uneven: bool, blocking: bool, method: str) -> float:
    """Largest difference between the gradient and central differences."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = row_sizes(ranks, rank) if uneven else (None, None)
    count = sum(sizes[0]) if sizes[0] is not None else 2 * ranks
    rows = torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    rows.requires_grad_()
    (grad,) = torch.autograd.grad(global_loss(rows, sizes, blocking, method), rows)

    worst, step = 0.0, 1e-6
    for owner in range(ranks):  # all ranks evaluate together; one of them moves one of its elements
        elements = torch.tensor(rows.numel() if rank == owner else 0)
        dist.all_reduce(elements)
        for element in range(int(elements)):
            values = []
            for sign in (1, -1):
                moved = rows.detach().clone()
                if rank == owner:
                    moved.view(-1)[element] += sign * step
                value = global_loss(moved, sizes, blocking, method)
                dist.all_reduce(value)
                values.append(value)
            if rank == owner:
                numeric = (values[0] - values[1]) / (2 * step)
                worst = max(worst, abs(float(numeric - grad.view(-1)[element])))
    return worst


@functools.cache
def transport_of(method: str) -> Transport:
    """Four ranks stand for two nodes of two."""
    world = dist.group.WORLD
    if method != "hierarchical":
        return Transport(world, method)
    return make_transports(world, [list(range(4))], ["a", "a", "b", "b"], torch.device("cpu"))["hierarchical"]


def hierarchical_case() -> list[float]:
    """Arrivals, gradients, and many launches in flight at once."""
    assert arrivals(False, "hierarchical") and arrivals(True, "hierarchical")
    transport = transport_of("hierarchical")
    sizes = row_sizes(4, dist.get_rank())
    rows = [torch.full((sum(sizes[0]), 3), float(10 * n + dist.get_rank())) for n in range(5)]
    flights = [start(part, transport, SplitSizes.plain(*sizes)) for part in rows]
    expected = [float(source) for source, count in enumerate(sizes[1]) for _ in range(count)]
    for n, flight in enumerate(flights):
        assert flight.wait()[:, 0].tolist() == [10 * n + source for source in expected]
    return [
        gradients(uneven, blocking, "hierarchical")
        for uneven, blocking in ((False, False), (True, False), (True, True))
    ]


def all_cases(function) -> list:  # type: ignore[no-untyped-def]
    """One start of the processes for all cases."""
    if function is arrivals:
        return [arrivals(uneven, method) for uneven in (False, True) for method in METHODS]
    cases = [(False, False), (True, False), (True, True)]
    return [gradients(*case, method) for case in cases for method in METHODS]


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_arrive_where_they_belong(ranks: int) -> None:
    assert all(all(results) for results in run_distributed(all_cases, ranks, arrivals))


def test_gradients() -> None:
    for errors in run_distributed(all_cases, 2, gradients):
        assert max(errors) < 1e-7


def test_hierarchical() -> None:
    for errors in run_distributed(hierarchical_case, 4):
        assert max(errors) < 1e-7


@pytest.mark.parametrize(
    ("ranks", "nodes", "layout"),
    [
        ([0, 1, 2, 3], "aabb", [[0, 1], [2, 3]]),
        ([2, 3, 4, 5], "aaaabb", [[2, 3], [4, 5]]),
        ([0, 1, 2, 3], "aaaa", None),  # one node
        ([0, 1], "ab", None),  # one rank per node
        ([0, 1, 2], "aab", None),  # unequal
        ([0, 1, 2, 3], "abab", None),  # a node's ranks do not follow each other
    ],
)
def test_which_groups_can_be_hierarchical(ranks: list[int], nodes: str, layout: list[list[int]] | None) -> None:
    assert ranks_by_node(ranks, nodes) == layout


def test_waiting_twice_is_an_error() -> None:
    flight = start(torch.zeros(1), Transport(None))
    flight.wait()
    with pytest.raises(RuntimeError, match="waited for already"):
        flight.wait()
