"""How fast bytes leave a GPU towards others of its node, and a node towards others."""

from __future__ import annotations

import bisect
import math

from scmoe_ds.simulate.cluster import Between, Curve, Inside
from scmoe_ds.simulate.places import Places


def share_of(curve: Curve, message_bytes: float) -> float:
    """Of a link's rate for messages of a size: linear in the logarithm of the size, constant beyond the ends."""
    points = sorted(curve.points)
    if not points:
        return 1.0
    at = bisect.bisect_left([size for size, _ in points], message_bytes)
    if at in (0, len(points)):
        return points[min(at, len(points) - 1)][1]
    (below, low), (above, high) = points[at - 1], points[at]
    return low + (high - low) * math.log(message_bytes / below) / math.log(above / below)


def exchange_seconds(sent: float, places: Places, inside: Inside, gpus_per_node: int) -> float:
    """An all-to-all among the ranks of a group on one node, without latency; all GPUs of the node do the same.

    Args:
        sent: bytes that a rank sends to each of its peers on the node, and receives from it.
    """
    peers = places.per_node - 1
    share = share_of(inside.efficiency, sent)
    if inside.kind == "nvlink mesh":
        # A pair of GPUs has its own links: those to GPUs outside of the group are idle.
        return sent * (gpus_per_node - 1) / (inside.rate * share) if peers else 0.0
    own = sent * peers / (inside.rate * share)
    return max(own, _root_seconds(sent, places, inside) / share)


def _root_seconds(sent: float, places: Places, inside: Inside) -> float:
    """What leaves a root complex for another one; with `host_bounce` all that its GPUs send, there and back."""
    if inside.kind != "pcie" or inside.gpus_per_root is None:
        return 0.0
    near = 1 if inside.host_bounce else places.within(inside.gpus_per_root)
    crossings = 2 if inside.host_bounce else 1
    gpus = min(inside.gpus_per_root, places.per_node * places.groups)
    return gpus * (places.per_node - near) * sent * crossings / (inside.root_rate or inside.rate)


def ring_rate(places: Places, inside: Inside, message_bytes: float, gpus_per_node: int) -> float:
    """Bytes per second through all rings of the group's ranks on one node."""
    rate = inside.rate
    if inside.kind == "nvlink mesh":  # links to GPUs outside of the group are in none of its rings
        rate *= (places.per_node - 1) / (gpus_per_node - 1)
    if inside.kind == "pcie" and inside.gpus_per_root is not None:
        root_rate = inside.root_rate or inside.rate
        if inside.host_bounce:  # each GPU's part of the ring crosses its root
            rate = min(rate, root_rate / (2 * inside.gpus_per_root))
        elif places.within(inside.gpus_per_root) < places.per_node:  # a ring leaves a root once, whatever its length
            rings = max(1, inside.gpus_per_root // places.within(inside.gpus_per_root))
            rate = min(rate, root_rate / rings)
    return rate * share_of(inside.efficiency, message_bytes)


def network_rate(between: Between, message_bytes: float) -> float:
    """Bytes per second out of a node, over all its NICs."""
    return between.nics * between.nic_rate * share_of(between.efficiency, message_bytes)


def spine_slowdown(between: Between, nodes: int) -> float:
    """Time that a full exchange between as many nodes takes in the spine, over its time in the NICs."""
    beyond = max(0, nodes - between.nodes_per_leaf)
    return between.oversubscription * beyond / (nodes - 1) if beyond else 0.0


def ring_slowdown(between: Between, nodes: int, hop: int) -> float:
    """The same of rings, of which few parts leave a leaf.

    Args:
        hop: nodes from one of a group to the next.
    """
    leaves = hop * nodes > between.nodes_per_leaf
    return between.oversubscription * min(1.0, hop / between.nodes_per_leaf) if leaves else 0.0
