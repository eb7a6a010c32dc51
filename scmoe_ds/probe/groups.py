"""Which ranks exchange: of one node, of several, and one of each node."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from scmoe_ds.parallel.groups import nodes_of_ranks, travel_group


@dataclass(frozen=True)
class Exchanging:
    """Disjoint groups of as many ranks that exchange at the same time, as expert-parallel groups do.

    Attributes:
        ranks, nodes: of each group.
        members: of all groups; other ranks stand still.
        group: this rank's; None: it stands still.
    """

    ranks: int
    nodes: int
    members: tuple[tuple[int, ...], ...]
    group: dist.ProcessGroup | None


def layouts(nodes: Sequence[Hashable]) -> list[tuple[int, int, tuple[tuple[int, ...], ...]]]:
    """Ranks, nodes and members of the groups that are measured.

    Inside the nodes 2, 4, 8, … ranks up to all; one rank of each node alone, which has its node's NICs for itself; all
    ranks of 2, 4, 8, … nodes up to all. Nodes with different numbers of ranks: all ranks together, and no more.

    Args:
        nodes: the node of every rank of the world.
    """
    by_node: dict[Hashable, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    several = list(by_node.values())
    per_node, world = len(several[0]), tuple(range(len(nodes)))
    neighbours = all(ranks == list(range(ranks[0], ranks[0] + per_node)) for ranks in several)
    if not neighbours or any(len(ranks) != per_node for ranks in several):
        return [(len(nodes), len(several), (world,))]
    found = [
        (size, 1, tuple(world[first : first + size] for first in world[::size]))
        for size in _doubled(per_node)
        if per_node % size == 0
    ]
    if len(several) > 1 and per_node > 1:
        found.append((len(several), len(several), (tuple(ranks[0] for ranks in several),)))
    for count in _doubled(len(several)):
        size = count * per_node
        firsts = range(0, len(world) - size + 1, size)
        found.append((size, count, tuple(world[first : first + size] for first in firsts)))
    return found


def exchanging() -> list[Exchanging]:
    """Makes the groups of this world; none for a rank alone. Collective."""
    if dist.get_world_size() == 1:
        return []
    me, found = dist.get_rank(), []
    for ranks, nodes, members in layouts(nodes_of_ranks()):
        mine = next((each for each in members if me in each), None)
        group = travel_group(mine or (me,))
        found.append(Exchanging(ranks, nodes, members, group if mine else None))
    return found


def _doubled(most: int) -> list[int]:
    """2, 4, 8, … below `most`, and `most`; nothing below 2."""
    found, size = [], 2
    while size < most:
        found.append(size)
        size *= 2
    return [*found, most] if most > 1 else []
