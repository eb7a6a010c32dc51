"""Links: inside a node, and between nodes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scmoe_ds.simulate.gpu import Count, Frozen, Share, Spread
from scmoe_ds.simulate.units import Bandwidth, Bytes, Seconds


class Curve(Frozen):
    """The share of a link's rate that a message reaches, by its size.

    Attributes:
        points: bytes of the message to one peer, and the share; between two points linear in the logarithm of the size,
            beyond the ends constant.
        spread: relative, of the shares: 0.1 is ± 10 %.
    """

    points: Annotated[tuple[tuple[Bytes, Share], ...], Field(min_length=1)]
    spread: Spread = 0.1


class Inside(Frozen):
    """Links between the GPUs of a node.

    Attributes:
        kind: a switch lets every GPU send at its full rate to any; a mesh splits it over the peers; with PCIe the GPUs
            of a root complex share its rate towards the others, and rows bounce through the host's memory where
            `host_bounce` says so. "loopback": processes on one CPU.
        rate: of one GPU, one direction.
        latency: of one message.
        gpus_per_root, root_rate: PCIe alone.
        host_bounce: whether each byte crosses the host's memory, at `root_rate` there and back.
        efficiency: of the rate, by message size.
    """

    kind: Literal["nvlink switch", "nvlink mesh", "pcie", "loopback"]
    rate: Bandwidth
    latency: Seconds
    efficiency: Curve
    gpus_per_root: Count | None = None
    root_rate: Bandwidth | None = None
    host_bounce: bool = False


class Between(Frozen):
    """The network.

    Attributes:
        nics: per node.
        nic_rate: of one NIC, one direction.
        latency: of one message.
        topology: rail: NIC i of every node hangs on switch i, other rails are reached through NVLink or the spine; fat
            tree: any NIC to any.
        oversubscription: of the spine: 1 is full bisection, 2 half; of traffic that leaves a leaf of `nodes_per_leaf`.
        efficiency: of the rate, by message size.
    """

    nics: Count
    nic_rate: Bandwidth
    latency: Seconds
    efficiency: Curve
    topology: Literal["rail", "fat tree"] = "fat tree"
    oversubscription: Annotated[float, Field(ge=1, le=64, strict=True)] = 1.0
    nodes_per_leaf: Count = 32
