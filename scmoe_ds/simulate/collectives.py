"""Bytes between ranks to milliseconds: the all-to-all of an MoE layer, and the collectives on gradients and parameters.

An all-to-all takes as long as the slowest of three: the links inside the nodes, the nodes' NICs and the spine between
their switches. All ranks of a node send at the same time and share its NICs. Each message costs its latency, one peer
after another.

All other collectives run as a ring or as a tree, whichever is faster, with NCCL's own model of both (its
src/graph/tuning.cc): a ring passes p - 1 parts on, twice for an all-reduce; a double binary tree goes up and down, at
0.9 of the rate. All groups of a kind run at the same time, and share the NICs, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scmoe_ds.simulate.case import Machine
from scmoe_ds.simulate.kernels import efficiency
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.links import exchange_seconds, network_rate, ring_rate, ring_slowdown, spine_slowdown
from scmoe_ds.simulate.places import Places, places_of
from scmoe_ds.simulate.routing import EVEN, Loads, distinct
from scmoe_ds.simulate.work import Collective, Exchange, Group

Bound = Literal["link", "NIC", "switch"]
_TREE_SHARE = 0.9
"""Of a ring's rate that NCCL expects of a tree."""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in an all-to-all, its own share among them.

    Attributes:
        inside: to the group's ranks, as the links of a node carry them.
        between: to the group's nodes, as the network carries them.
    """

    inside: float
    between: float


def sent_by_rank(exchange: Exchange, layout: Layout, places: Places, num_experts: int) -> Sent:
    """What a rank sends: a copy of a row per choice, or one per rank (and, hierarchical, per node) that is chosen."""
    whole = exchange.rows * exchange.row_bytes
    if layout.copies == "choice" or exchange.padded:
        return Sent(whole, whole)
    chosen = num_experts, exchange.choices, exchange.parts
    per_choice = whole / (exchange.choices * exchange.parts)
    ranks = per_choice * distinct(places.ranks, *chosen)
    nodes = per_choice * distinct(places.nodes, *chosen) if layout.hierarchical else ranks
    return Sent(ranks, nodes)


def all_to_all_ms(
    exchange: Exchange, layout: Layout, machine: Machine, num_experts: int, loads: Loads = EVEN, chunks: int = 1
) -> tuple[float, Bound]:
    """One chunk of a dispatch or a combine, and what bounds it.

    Args:
        num_experts: of the layer.
        loads: of the busiest rank and node; a padded exchange does not depend on them.
        chunks: that the rows are cut into.
    """
    places = places_of("ep", layout, machine.cluster.gpus_per_node)
    if places.ranks == 1:
        return 0.0, "link"
    sent = sent_by_rank(exchange, layout, places, num_experts)
    sent = Sent(sent.inside / chunks, sent.between / chunks)
    return _all_to_all_ms(sent, layout.hierarchical, places, machine, EVEN if exchange.padded else loads)


def counts_ms(exchange: Exchange, layout: Layout, machine: Machine) -> float:
    """The exchange of row counts ahead of the rows; 0 without one."""
    places = places_of("ep", layout, machine.cluster.gpus_per_node)
    if not exchange.count_bytes or places.ranks == 1:
        return 0.0
    return _all_to_all_ms(Sent(exchange.count_bytes, exchange.count_bytes), False, places, machine, EVEN)[0]


def _all_to_all_ms(
    sent: Sent, hierarchical: bool, places: Places, machine: Machine, loads: Loads
) -> tuple[float, Bound]:
    inside, between = machine.links("all-to-all")
    steps = hierarchical and places.nodes > 1
    message = sent.between / (places.nodes if steps else places.ranks)  # hierarchical: one to each node's like rank
    per_peer = sent.inside / (places.per_node if steps else places.ranks)
    if between is not None and between.topology == "rail" and not steps:
        per_peer += (places.nodes - 1) * message  # over NVLink to the GPU at the NIC of the receiver's rail (PXN)
    on_node = (places.per_node - 1) * inside.latency
    on_node += loads.busiest * exchange_seconds(per_peer, places, inside, machine.cluster.gpus_per_node)
    if places.nodes == 1:
        return 1e3 * on_node, "link"
    if between is None:
        raise ValueError(f"a group on {places.nodes} nodes, of a cluster without a network")
    peers = places.nodes - 1 if steps else places.ranks - places.per_node
    leaving = peers * message * places.per_node * places.groups * loads.busiest_node
    network = leaving / network_rate(between, message)
    spine = network * spine_slowdown(between, places.nodes)
    latency = peers * between.latency
    bound: Bound = "switch" if spine > network else "NIC"
    outside = latency + max(network, spine)
    if steps:  # one after the other; before each of them the rows are put in another order
        on_node += 2 * 2 * sent.inside / (machine.cluster.gpu.bandwidth * efficiency(machine.cluster.gpu, "rows"))
        return 1e3 * (on_node + outside), bound if outside > on_node else "link"
    return 1e3 * max(on_node, outside), bound if outside > on_node else "link"


def reduce_ms(
    collective: Collective, size: float, group: Group, layout: Layout, machine: Machine
) -> tuple[float, Bound]:
    """A collective on one tensor, and what bounds it.

    Args:
        size: bytes of the whole tensor on one rank, before a reduce-scatter or after an all-gather.
    """
    places = places_of(group, layout, machine.cluster.gpus_per_node)
    if places.ranks == 1 or not size:
        return 0.0, "link"
    inside, between = machine.links(collective)
    rounds = 2 if collective == "all-reduce" else 1
    bound: Bound = "link"
    rate = ring_rate(places, inside, size, machine.cluster.gpus_per_node) if places.per_node > 1 else math.inf
    latency_out = 0.0
    if places.nodes > 1:
        if between is None:
            raise ValueError(f"a group on {places.nodes} nodes, of a cluster without a network")
        latency_out = between.latency
        spine = ring_slowdown(between, places.nodes, max(1, places.stride // machine.cluster.gpus_per_node))
        network = network_rate(between, size) / places.groups / max(1.0, spine)
        if network < rate:
            rate, bound = network, "switch" if spine > 1 else "NIC"
    steps, steps_out = places.ranks - 1, places.nodes - 1
    ring = rounds * (
        (steps - steps_out) * inside.latency + steps_out * latency_out + steps / places.ranks * size / rate
    )
    if collective != "all-reduce":
        return 1e3 * ring, bound
    latency = (places.per_node - 1) * inside.latency + math.log2(places.nodes) * latency_out
    return 1e3 * min(ring, 2 * (latency + size / (_TREE_SHARE * rate))), bound
