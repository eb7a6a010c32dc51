"""Which ranks share a node, and which ranks form the groups of a layout."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from scmoe_ds.parallel.agreement import gather


def nodes_of_ranks() -> list[Hashable]:
    """The node of every rank of the world: the launcher's node number, or the host name. Collective."""
    nodes: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, os.environ.get("CROSS_RANK", socket.gethostname()))
    return nodes


def travel_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of the same ranks for the exchange of rows and of nothing else; one for all layers. Collective.

    Collectives of one group run one after another. On the tensor-parallel group rows would wait for the backbone's
    all-reduces, and these for rows; on DeepSpeed's expert-parallel group, for its norms and overflow checks. The price
    is one more NCCL communicator per rank.

    Args:
        ranks: this rank's group; every rank of the world is in one.
    """
    return _travel_group(dist.group.WORLD, tuple(ranks))


@functools.cache
def _travel_group(world: dist.ProcessGroup, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    made = {each: dist.new_group(each) for each in dict.fromkeys(gather(ranks))}  # in the same order on every rank
    return made[ranks]


@dataclass(frozen=True)
class Layout:
    """Which ranks form which groups, as megatron-core and DeepSpeed make them.

    Attributes:
        ranks: size of the world.
        tensor_size, expert_size: ranks per tensor-parallel and per expert-parallel group.
        divided_experts: expert tensor parallelism: the ranks of a tensor-parallel group hold pieces of the same
            experts.
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
        starts = [first + rank for first in range(0, self.ranks, width) for rank in range(self.tensor_size)]
        return [range(start, start + width, self.tensor_size) for start in starts]

    @property
    def exchange(self) -> list[Sequence[int]]:
        """Groups in which tokens are sent to experts and back (see scmoe_ds.moe.slices)."""
        tensor_is_larger = self.tensor_size > self.expert_size and not self.divided_experts
        return self.tensor_parallel if tensor_is_larger else self.expert_parallel

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
