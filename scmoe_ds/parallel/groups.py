"""Which ranks share a node, and the process groups that a hierarchical all-to-all needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from scmoe_ds.comm.hierarchical import HierarchicalTransport
from scmoe_ds.comm.transport import METHODS, Transport


def nodes_of_ranks() -> list[Hashable]:
    """The node of every rank of the world: the launcher's node number, or the host name. Collective."""
    nodes: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, os.environ.get("CROSS_RANK", socket.gethostname()))
    return nodes


@dataclass(frozen=True)
class Layout:
    """Which ranks form which groups; as megatron-core and DeepSpeed make them.

    Attributes:
        ranks: of the world.
        tensor_size, expert_size: ranks per tensor-parallel and per expert-parallel group.
        divided_experts: expert tensor parallelism: each expert is in pieces on the ranks of a tensor-parallel group.
    """

    ranks: int
    tensor_size: int = 1
    expert_size: int = 1
    divided_experts: bool = False

    @property
    def tensor_parallel(self) -> list[Sequence[int]]:
        """Groups that share layers."""
        return self._consecutive(self.tensor_size)

    @property
    def expert_parallel(self) -> list[Sequence[int]]:
        """Groups that share one set of experts."""
        if not self.divided_experts:
            return self._consecutive(self.expert_size)
        width = self.tensor_size * self.expert_size
        starts = [block + place for block in range(0, self.ranks, width) for place in range(self.tensor_size)]
        return [range(start, start + width, self.tensor_size) for start in starts]

    @property
    def travel(self) -> list[Sequence[int]]:
        """Groups in which tokens travel to experts and back (see scmoe_ds.moe.shares)."""
        return (
            self.expert_parallel
            if self.divided_experts or self.expert_size >= self.tensor_size
            else self.tensor_parallel
        )

    def _consecutive(self, size: int) -> list[Sequence[int]]:
        return [range(first, first + size) for first in range(0, self.ranks, size)]


def describe_groups(layout: Layout, nodes: Sequence[Hashable], shown: int = 8) -> list[str]:
    """Which ranks share the experts, and the layers, of a model, and which of these groups cross nodes, in words.

    Args:
        layout: of the world's ranks.
        nodes: the node of every rank of the world.
        shown: the most groups of a kind to list.
    """
    lines = [_describe("expert-parallel", "send tokens", layout.expert_parallel, nodes, shown)]
    if layout.tensor_size > 1:
        lines.insert(0, _describe("tensor-parallel", "add up activations", layout.tensor_parallel, nodes, shown))
    return lines


def _describe(kind: str, purpose: str, groups: Sequence[Sequence[int]], nodes: Sequence[Hashable], shown: int) -> str:
    texts = []
    for ranks in groups[:shown]:
        follow = ranks[-1] - ranks[0] + 1 == len(ranks)
        members = f"{ranks[0]}–{ranks[-1]}" if follow and len(ranks) > 1 else "+".join(map(str, ranks))
        spanned = len({nodes[rank] for rank in ranks})
        texts.append(f"{members} (over {spanned} nodes)" if spanned > 1 else members)
    crossing = sum(len({nodes[rank] for rank in ranks}) > 1 for ranks in groups)
    rest = f", … ({len(groups)} in all)" if len(groups) > shown else ""
    where = f"{crossing} of {len(groups)} {purpose} between nodes" if crossing else "all stay inside their node"
    return f"{kind} groups of ranks {', '.join(texts)}{rest}: {where} ({len(set(nodes))} node(s))"


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
