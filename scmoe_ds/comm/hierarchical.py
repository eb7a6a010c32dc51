"""An all-to-all in two steps, inside the nodes and then across: fewer and larger messages on the slow links.

Rank (n, g) is place g of node n. First the ranks of a node exchange so that (n, g) holds everything from its node for
the ranks (·, g); then the ranks of one place exchange across nodes. Every pair of nodes then shares G messages of G
pieces each instead of G * G of one.

The second step needs the first one's result, so both run on a thread of their own, in the order of their launches, over
process groups that nothing else uses: ranks launch in the same order, hence the steps meet in the same order.
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
        place_group: this rank's place in every node, in the order of the nodes.
    """

    method: str = "hierarchical"
    node_group: dist.ProcessGroup | None = None
    place_group: dist.ProcessGroup | None = None
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "all-to-all"), compare=False)

    def __post_init__(self) -> None:
        if self.node_group is None or self.place_group is None:
            raise ValueError("a hierarchical all-to-all needs a group per node and one per place")

    def launch(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> Wait:
        """See `Transport.launch`."""
        if not rows.is_cuda:
            step: Future[None] = self.worker.submit(self._exchange, received, rows, receive, send)
            return step.result
        ready = torch.cuda.current_stream(rows.device).record_event()
        on_stream = self.worker.submit(self._exchange_on_stream, ready, received, rows, receive, send)
        return lambda: torch.cuda.current_stream(rows.device).wait_event(on_stream.result())

    def _exchange_on_stream(
        self, ready: torch.cuda.Event, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> torch.cuda.Event:
        stream = torch.cuda.Stream(rows.device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            self._exchange(received, rows, receive, send)
        return stream.record_event()

    @torch.no_grad()
    def _exchange(self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]) -> None:
        places, nodes = dist.get_world_size(self.node_group), dist.get_world_size(self.place_group)
        place = dist.get_rank(self.node_group)
        # sends[h][n * places + g]: rows from place h of this node to rank (n, g).
        mine = torch.tensor(list(send), device=rows.device)
        gathered = [torch.empty_like(mine) for _ in range(places)]
        dist.all_gather(gathered, mine, group=self.node_group)
        sends = [counts.tolist() for counts in gathered]

        pieces = rows.split(list(send))
        by_place = torch.cat([pieces[n * places + g] for g in range(places) for n in range(nodes)])
        to_place = [sum(send[n * places + g] for n in range(nodes)) for g in range(places)]
        from_place = [[sends[h][n * places + place] for n in range(nodes)] for h in range(places)]
        inside = rows.new_empty((sum(map(sum, from_place)), *rows.shape[1:]))
        dist.all_to_all_single(
            inside, by_place, [sum(counts) for counts in from_place], to_place, group=self.node_group
        )

        parts = inside.split([count for counts in from_place for count in counts])
        by_node = torch.cat([parts[h * nodes + n] for n in range(nodes) for h in range(places)])
        to_node = [sum(from_place[h][n] for h in range(places)) for n in range(nodes)]
        from_node = [sum(receive[n * places : (n + 1) * places]) for n in range(nodes)]
        dist.all_to_all_single(received, by_node, from_node, to_node, group=self.place_group)


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
