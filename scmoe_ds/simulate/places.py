"""Where the ranks of a group are: how many share a node, and how many nodes they are on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.work import Group


@dataclass(frozen=True)
class Places:
    """A group on a cluster.

    Attributes:
        ranks: of the group.
        stride: between two neighbours of the group, in ranks of the world.
        per_node: of its ranks, on one node.
        nodes: that it is on.
        groups: of its kind that have ranks on one node, and communicate at the same time.
    """

    ranks: int
    stride: int
    per_node: int
    nodes: int
    groups: int

    def within(self, gpus: int) -> int:
        """How many of its ranks share `gpus` neighbouring GPUs of a node."""
        return max(1, min(self.per_node, gpus // self.stride))


def places_of(group: Group, layout: Layout, gpus_per_node: int) -> Places:
    """A group as `Layout` describes it; the world fills nodes one by one."""
    tensor, experts = layout.tensor_parallel, layout.expert_parallel
    divided = tensor if layout.expert_tensor_parallel else 1
    ranks, stride = {
        "tp": (tensor, 1),
        "dp": (layout.data_parallel, tensor),
        "ep": (experts, divided),
        "edp": (layout.expert_data_parallel, divided * experts),
    }[group]
    per_node = max(1, min(ranks, gpus_per_node // stride))
    if layout.world > gpus_per_node > ranks * stride and gpus_per_node % (ranks * stride):
        per_node = math.ceil(ranks / 2)  # some groups lie on two nodes, and all others wait for them
    active = min(gpus_per_node, layout.world)
    return Places(ranks, stride, per_node, math.ceil(ranks / per_node), max(1, active // per_node))
