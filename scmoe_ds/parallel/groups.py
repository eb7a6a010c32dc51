"""Which ranks share a node, and the process groups that a hierarchical all-to-all needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Sequence

import torch.distributed as dist

from scmoe_ds.overlap.hierarchical import HierarchicalTransport
from scmoe_ds.overlap.transport import METHODS, Transport


def nodes_of_ranks() -> list[Hashable]:
    """The node of every rank of the world: the launcher's node number, or the host name. Collective."""
    nodes: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, os.environ.get("CROSS_RANK", socket.gethostname()))
    return nodes


def describe_groups(ep_size: int, nodes: Sequence[Hashable], shown: int = 8) -> str:
    """Which ranks share the experts of a layer, and which of these groups send tokens between nodes, in words.

    Args:
        ep_size: ranks per group; consecutive ones.
        nodes: the node of every rank of the world.
        shown: the most groups to list.
    """
    groups = [range(first, first + ep_size) for first in range(0, len(nodes), ep_size)]
    texts = []
    for ranks in groups[:shown]:
        members = f"{ranks[0]}–{ranks[-1]}" if ep_size > 1 else str(ranks[0])
        spanned = len({nodes[rank] for rank in ranks})
        texts.append(f"{members} (over {spanned} nodes)" if spanned > 1 else members)
    crossing = sum(len({nodes[rank] for rank in ranks}) > 1 for ranks in groups)
    rest = f", … ({len(groups)} in all)" if len(groups) > shown else ""
    where = f"{crossing} of {len(groups)} send tokens between nodes" if crossing else "all stay inside their node"
    return f"expert-parallel groups of ranks {', '.join(texts)}{rest}: {where} ({len(set(nodes))} node(s))"


def ranks_by_node(ranks: Sequence[int], nodes: Sequence[Hashable]) -> list[list[int]] | None:
    """The ranks of a group node by node, if a hierarchical all-to-all makes sense for it.

    Returns:
        None for a group inside one node, one rank per node, nodes of different sizes, or ranks of a node that do not
        follow each other.
    """
    rows: dict[Hashable, list[int]] = {}
    for rank in ranks:
        rows.setdefault(nodes[rank], []).append(rank)
    layout = list(rows.values())
    places = {len(row) for row in layout}
    in_order = [rank for row in layout for rank in row] == list(ranks)
    return layout if len(layout) > 1 and len(places) == 1 and places != {1} and in_order else None


def make_transports(
    group: dist.ProcessGroup, all_groups: Sequence[Sequence[int]], nodes: Sequence[Hashable]
) -> dict[str, Transport]:
    """Every all-to-all primitive that a group can use. Collective over the world: it may create groups.

    Args:
        group: this rank's expert-parallel group.
        all_groups: the global ranks of all expert-parallel groups, the same list on every rank.
        nodes: the node of every rank of the world.
    """
    transports = {method: Transport(group, method) for method in METHODS}
    layouts = [ranks_by_node(ranks, nodes) for ranks in all_groups]
    if None in layouts:  # one choice for the whole world, so that its groups are alike
        return transports
    mine: dict[str, dist.ProcessGroup] = {}
    for layout in layouts:
        assert layout is not None
        for name, members in [("node", row) for row in layout] + [("place", list(column)) for column in zip(*layout)]:  # noqa: B905
            created = dist.new_group(members)
            if dist.get_rank() in members:
                mine[name] = created
    hierarchical = HierarchicalTransport(group, node_group=mine["node"], place_group=mine["place"])
    return {**transports, hierarchical.method: hierarchical}
