"""An all-to-all in two steps, inside the nodes and then across: fewer and larger messages on the slow links.

Each of the nodes has G ranks, with local ranks 0 … G - 1. First the ranks of a node exchange rows, so that local rank g
holds all rows from its node for local rank g of any node. Then the ranks with the same local rank exchange rows. A pair
of nodes exchanges G messages of G pieces each instead of G * G messages of one piece.

The second step needs the result of the first one. So both run on a thread of their own, in the order of their launches.
Nothing else uses their process groups. All ranks launch in the same order, so the steps of one exchange meet.

Only on gloo. NCCL wants all collectives of a device in the same order on all ranks, whatever their group, and a thread
launches at any moment. There it would also gain little: NCCL itself hands a node's messages over inside the node (PXN).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.comm.transport import METHODS, Transport, Wait


@dataclass(frozen=True)
class HierarchicalTransport(Transport):
    """`Transport` over consecutive ranks of equally filled nodes.

    Attributes:
        group: all ranks, node by node.
        node_group: this rank's node, in the order of `group`.
        local_rank_group: the ranks with this local rank on every node, in the order of the nodes.
    """

    method: str = "hierarchical"
    node_group: dist.ProcessGroup | None = None
    local_rank_group: dist.ProcessGroup | None = None
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "all-to-all"), compare=False)

    def __post_init__(self) -> None:
        if self.node_group is None or self.local_rank_group is None:
            raise ValueError("a hierarchical all-to-all needs a group per node and one per local rank")

    def launch(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """See `Transport.launch`."""
        step: Future[None] = self.worker.submit(self._exchange, received, rows, receive, send)
        return step.result

    @torch.no_grad()
    def _exchange(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
        per_node, nodes = dist.get_world_size(self.node_group), dist.get_world_size(self.local_rank_group)
        local_rank = dist.get_rank(self.node_group)
        # sends[h][n * per_node + g]: rows from local rank h of this node to local rank g of node n.
        mine = torch.tensor(list(send))
        gathered = [torch.empty_like(mine) for _ in range(per_node)]
        dist.all_gather(gathered, mine, group=self.node_group)
        sends = [counts.tolist() for counts in gathered]

        pieces = rows.split(list(send))
        by_local_rank = torch.cat([pieces[n * per_node + g] for g in range(per_node) for n in range(nodes)])
        to_local_rank = [sum(send[n * per_node + g] for n in range(nodes)) for g in range(per_node)]
        from_local_rank = [[sends[h][n * per_node + local_rank] for n in range(nodes)] for h in range(per_node)]
        inside = rows.new_empty((sum(map(sum, from_local_rank)), *rows.shape[1:]))
        dist.all_to_all_single(
            inside, by_local_rank, [sum(counts) for counts in from_local_rank], to_local_rank, group=self.node_group
        )

        parts = inside.split([count for counts in from_local_rank for count in counts])
        by_node = torch.cat([parts[h * nodes + n] for n in range(nodes) for h in range(per_node)])
        to_node = [sum(from_local_rank[h][n] for h in range(per_node)) for n in range(nodes)]
        from_node = [sum(receive[n * per_node : (n + 1) * per_node]) for n in range(nodes)]
        dist.all_to_all_single(received, by_node, from_node, to_node, group=self.local_rank_group)


def ranks_by_node(ranks: Sequence[int], nodes: Sequence[Hashable]) -> list[list[int]] | None:
    """The ranks of a group node by node.

    Returns:
        None if a hierarchical all-to-all makes no sense: the group lies inside one node or has one rank per node, its
        nodes have different numbers of ranks, or the ranks of a node do not follow each other.
    """
    rows: dict[Hashable, list[int]] = {}
    for rank in ranks:
        rows.setdefault(nodes[rank], []).append(rank)
    layout = list(rows.values())
    per_node = {len(row) for row in layout}
    in_order = [rank for row in layout for rank in row] == list(ranks)
    return layout if len(layout) > 1 and len(per_node) == 1 and per_node != {1} and in_order else None


def make_transports(
    group: dist.ProcessGroup,
    all_groups: Sequence[Sequence[int]],
    nodes: Sequence[Hashable],
    device: torch.device,
) -> dict[str, Transport]:
    """Every all-to-all primitive that a group can use. Collective over the world, since it may create groups.

    Args:
        group: this rank's expert-parallel group.
        all_groups: the global ranks of all expert-parallel groups, the same list on every rank.
        nodes: the node of every rank of the world.
        device: of the rows.
    """
    transports = {method: Transport(group, method) for method in METHODS}
    if device.type == "cuda":
        return transports
    layouts = [ranks_by_node(ranks, nodes) for ranks in all_groups]
    if None in layouts:  # one choice for the whole world, so that its groups are alike
        return transports
    mine: dict[str, dist.ProcessGroup] = {}
    for layout in layouts:
        assert layout is not None
        columns = [list(column) for column in zip(*layout, strict=True)]
        for name, members in [("node", row) for row in layout] + [("local rank", column) for column in columns]:
            created = dist.new_group(members)
            if dist.get_rank() in members:
                mine[name] = created
    hierarchical = HierarchicalTransport(group, node_group=mine["node"], local_rank_group=mine["local rank"])
    return {**transports, hierarchical.method: hierarchical}
