"""Times of collectives against closed forms, written down here anew."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest

from scmoe_ds.simulate.cluster import Curve
from scmoe_ds.simulate.collectives import all_to_all_ms, counts_ms, reduce_ms, sent_by_rank
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.places import places_of
from scmoe_ds.simulate.routing import Loads, distinct
from scmoe_ds.simulate.work import Exchange
from tests.simulate.clusters import machine

EXCHANGE = Exchange(rows=8192.0, choices=1, row_bytes=2048.0, padded=False)
BYTES = 8192 * 2048.0


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def test_without_peers_nothing_travels() -> None:
    assert all_to_all_ms(EXCHANGE, Layout(world=8), machine(), 8) == (0.0, "link")
    for group in ("tp", "ep"):
        assert reduce_ms("all-reduce", BYTES, group, Layout(world=8), machine()) == (0.0, "link")  # type: ignore[arg-type]


def test_a_switch_takes_what_leaves_a_rank_and_a_latency_per_peer() -> None:
    layout = Layout(world=4, expert_parallel=4)
    ms, bound = all_to_all_ms(EXCHANGE, layout, machine(1), 8)
    assert (ms, bound) == (close(1e3 * (3 * 1e-6 + BYTES * 3 / 4 / 1e11)), "link")
    infinite = machine(1, inside={"rate": 1e30})
    assert all_to_all_ms(EXCHANGE, layout, infinite, 8)[0] == close(3e-3)
    assert all_to_all_ms(EXCHANGE, layout, machine(1), 8, chunks=4)[0] == close(3e-3 + 1e3 * BYTES / 4 * 3 / 4 / 1e11)


def test_a_mesh_has_one_link_per_peer() -> None:
    mesh = machine(1, inside={"kind": "nvlink mesh", "latency": 0.0})
    whole = all_to_all_ms(EXCHANGE, Layout(world=4, expert_parallel=4), mesh, 8)[0]
    assert whole == close(1e3 * BYTES * 3 / 4 / 1e11)
    half = all_to_all_ms(EXCHANGE, Layout(world=4, expert_parallel=2), mesh, 8)[0]
    assert half == close(1e3 * BYTES / 2 / (1e11 / 3))  # two of three links are idle
    pair, all_of_it = (
        reduce_ms("all-gather", 1e9, "tp", Layout(world=4, tensor_parallel=ranks), mesh)[0] for ranks in (2, 4)
    )
    assert (pair, all_of_it) == (close(1e3 / 2 * 1e9 / (1e11 / 3)), close(1e3 * 3 / 4 * 1e9 / 1e11))


@pytest.mark.parametrize(("ranks", "per_node", "nodes"), [(3, 2, 2), (6, 3, 2), (4, 4, 1), (8, 8, 1), (16, 8, 2)])
def test_groups_that_do_not_fill_a_node_lie_on_two(ranks: int, per_node: int, nodes: int) -> None:
    """Ranks 6 to 11 are on two nodes of eight, and every group waits for the slowest in the next collective."""
    places = places_of("ep", Layout(world=48, expert_parallel=ranks), 8)
    assert (places.per_node, places.nodes) == (per_node, nodes)
    assert places_of("ep", Layout(world=6, expert_parallel=6), 8).nodes == 1


def test_pcie_root_complexes_share_their_way_out() -> None:
    pcie = {"kind": "pcie", "latency": 0.0, "gpus_per_root": 2, "root_rate": 2e10}
    layout = Layout(world=4, expert_parallel=4)
    # Two GPUs of a root send half of their rows each to the other root.
    assert all_to_all_ms(EXCHANGE, layout, machine(1, inside=pcie), 8)[0] == close(1e3 * 2 * BYTES / 2 / 2e10)
    inside_root = Layout(world=4, expert_parallel=2)
    assert all_to_all_ms(EXCHANGE, inside_root, machine(1, inside=pcie), 8)[0] == close(1e3 * BYTES / 2 / 1e11)
    bouncing = machine(1, inside={**pcie, "host_bounce": True})
    assert all_to_all_ms(EXCHANGE, inside_root, bouncing, 8)[0] == close(1e3 * 2 * 2 * BYTES / 2 / 2e10)


def test_all_gpus_of_a_node_share_its_nics() -> None:
    layout = Layout(world=8, expert_parallel=8)
    ms, bound = all_to_all_ms(EXCHANGE, layout, machine(), 8)
    assert (ms, bound) == (close(1e3 * (4 * 1e-5 + 4 * BYTES * 4 / 8 / 2e10)), "NIC")
    fast = machine(between={"nic_rate": 1e30, "latency": 0.0})
    assert all_to_all_ms(EXCHANGE, layout, fast, 8) == (close(1e3 * (3 * 1e-6 + BYTES * 3 / 8 / 1e11)), "link")


def test_rails_are_reached_over_the_links_of_the_node() -> None:
    fast = machine(between={"nic_rate": 1e30, "latency": 0.0, "topology": "rail"}, inside={"latency": 0.0})
    # To 3 peers: their own rows, and those of the like rank on the other node.
    expected = 1e3 * 3 * (BYTES / 8 + BYTES / 8) / 1e11
    assert all_to_all_ms(EXCHANGE, Layout(world=8, expert_parallel=8), fast, 8)[0] == close(expected)


def test_an_oversubscribed_spine_carries_what_leaves_a_leaf() -> None:
    network = {"oversubscription": 4.0, "nodes_per_leaf": 2, "latency": 0.0}
    layout = Layout(world=16, expert_parallel=16)
    ms, bound = all_to_all_ms(EXCHANGE, layout, machine(4, between=network), 16)
    # Of three other nodes two are on another leaf.
    assert (ms, bound) == (close(1e3 * 4 * BYTES * 12 / 16 / 2e10 * 4 * 2 / 3), "switch")
    inside_leaf = all_to_all_ms(EXCHANGE, Layout(world=8, expert_parallel=8), machine(between=network), 16)
    assert inside_leaf[1] == "NIC"


def test_hierarchical_sends_one_message_to_each_node() -> None:
    layout = Layout(world=16, expert_parallel=16, hierarchical=True)
    inside = 3e-6 + BYTES * 3 / 4 / 1e11 + 4 * BYTES / 1e12  # and all rows are read and written twice
    between = 3 * 1e-5 + 4 * BYTES * 3 / 4 / 2e10
    assert all_to_all_ms(EXCHANGE, layout, machine(4), 16)[0] == close(1e3 * (inside + between))


@pytest.mark.parametrize("copies", ["choice", "rank"])
def test_on_one_node_hierarchical_is_flat(copies: Any) -> None:
    flat = Layout(world=8, expert_parallel=4, copies=copies)
    steps = Layout(world=8, expert_parallel=4, copies=copies, hierarchical=True)
    exchange = dataclasses.replace(EXCHANGE, choices=2)
    assert all_to_all_ms(exchange, steps, machine(), 8) == all_to_all_ms(exchange, flat, machine(), 8)


def test_distinct_ranks_by_counting_all_choices() -> None:
    for ranks, experts, choices in ((2, 4, 2), (4, 8, 3), (3, 6, 4), (8, 8, 2), (1, 4, 2)):
        held = experts // ranks
        counted = [len({each // held for each in chosen}) for chosen in itertools.combinations(range(experts), choices)]
        assert distinct(ranks, experts, choices) == close(sum(counted) / len(counted))


def test_distinct_ranks_of_parts_by_counting_all_choices() -> None:
    for ranks, experts, choices, parts in ((2, 4, 2, 2), (8, 4, 2, 2), (8, 4, 1, 4), (12, 8, 3, 3), (4, 2, 2, 2)):
        held = experts * parts // ranks
        counted = [
            len({(each * parts + part) // held for each in chosen for part in range(parts)})
            for chosen in itertools.combinations(range(experts), choices)
        ]
        assert distinct(ranks, experts, choices, parts) == close(sum(counted) / len(counted))


def test_a_copy_per_rank_is_no_more_than_one_per_choice() -> None:
    for world, choices in itertools.product((2, 4, 8, 16), (1, 2, 4)):
        exchange = Exchange(1024.0, choices, 512.0, padded=False)
        sent = [
            sent_by_rank(exchange, layout, places_of("ep", layout, 4), 16)
            for copies in ("choice", "rank")
            for layout in [Layout(world=world, expert_parallel=world, copies=copies, hierarchical=True)]  # type: ignore[arg-type]
        ]
        assert sent[1].inside <= sent[0].inside * (1 + 1e-12) and sent[1].between <= sent[1].inside * (1 + 1e-12)
    assert distinct(4, 8, 1) == close(1.0)


def test_padding_costs_the_same_however_uneven_the_routing() -> None:
    layout, loads = Layout(world=4, expert_parallel=4), Loads((0.25, 0.75), (2.0, 2 / 3), 1.0)
    padded = Exchange(8192.0, 2, 2048.0, padded=True)
    assert all_to_all_ms(padded, layout, machine(1), 8, loads) == all_to_all_ms(EXCHANGE, layout, machine(1), 8)
    exact = all_to_all_ms(EXCHANGE, layout, machine(1), 8, loads)[0]
    assert exact == close(1e3 * (3e-6 + 2 * BYTES * 3 / 4 / 1e11))


def test_counts_travel_ahead() -> None:
    layout = Layout(world=4, expert_parallel=4)
    assert counts_ms(EXCHANGE, layout, machine(1)) == 0.0
    with_counts = Exchange(8192.0, 2, 2048.0, padded=False, count_bytes=64.0)
    assert counts_ms(with_counts, layout, machine(1)) == close(1e3 * (3e-6 + 48 / 1e11))


def test_rings_and_trees_on_a_node() -> None:
    layout, free = Layout(world=4, tensor_parallel=4), machine(1, inside={"latency": 0.0})
    assert reduce_ms("all-reduce", 1e9, "tp", layout, free)[0] == close(1e3 * 2 * 3 / 4 * 1e9 / 1e11)
    for collective in ("reduce-scatter", "all-gather"):
        ms = reduce_ms(collective, 1e9, "tp", layout, machine(1))[0]  # type: ignore[arg-type]
        assert ms == close(1e3 * (3e-6 + 3 / 4 * 1e9 / 1e11))
    infinite = machine(1, inside={"rate": 1e30})
    assert reduce_ms("all-reduce", 1e9, "tp", layout, infinite)[0] == close(1e3 * 2 * 3e-6)


def test_between_nodes_the_groups_of_a_node_share_its_nics() -> None:
    free = machine(4, inside={"latency": 0.0}, between={"latency": 0.0})
    # One group with all GPUs of a node; four groups, with one GPU of each node.
    assert reduce_ms("all-gather", 1e9, "dp", Layout(world=16), free) == (close(1e3 * 15 / 16 * 1e9 / 2e10), "NIC")
    strided = Layout(world=16, expert_parallel=4)
    assert reduce_ms("all-gather", 1e9, "edp", strided, free) == (close(1e3 * 3 / 4 * 1e9 / (2e10 / 4)), "NIC")


def test_many_nodes_take_a_tree() -> None:
    latencies = machine(64, inside={"rate": 1e30}, between={"nic_rate": 1e30})
    layout = Layout(world=256)
    ring = 2 * ((255 - 63) * 1e-6 + 63 * 1e-5)
    tree = 2 * (3e-6 + 6 * 1e-5)
    assert reduce_ms("all-reduce", 1e6, "dp", layout, latencies)[0] == close(1e3 * min(ring, tree))
    assert reduce_ms("all-gather", 1e6, "dp", layout, latencies)[0] == close(1e3 * ring / 2)


def test_small_messages_reach_less_of_a_rate() -> None:
    curve = Curve(points=((1e4, 0.25), (1e6, 0.75)), spread=0.0)
    link = machine(1, inside={"latency": 0.0, "efficiency": curve})
    layout = Layout(world=4, expert_parallel=4)
    for message, share in ((1e3, 0.25), (1e5, 0.5), (1e8, 0.75)):
        exchange = Exchange(4.0, 1, message, padded=False)
        assert all_to_all_ms(exchange, layout, link, 8)[0] == close(1e3 * 3 * message / (1e11 * share))


def _both_ms(exchange: Exchange, layout: Layout, rate: float, nic_rate: float, latency: float) -> float:
    inside, between = {"rate": rate, "latency": latency}, {"nic_rate": nic_rate, "latency": latency}
    priced = machine(layout.world // 4, inside=inside, between=between | {"oversubscription": 2.0})
    reduced = reduce_ms("all-reduce", exchange.rows * 4096, "dp", layout, priced)[0]
    return all_to_all_ms(exchange, layout, priced, 64)[0] + reduced


def test_better_hardware_and_less_to_send_never_cost_more() -> None:
    chance = random.Random(0)
    for _ in range(200):
        nodes = chance.choice((1, 2, 4, 8))
        layout = Layout(
            world=4 * nodes,
            expert_parallel=2 ** chance.randint(0, round(math.log2(4 * nodes))),
            hierarchical=chance.random() < 0.5,
            copies=chance.choice(("choice", "rank")),
        )
        exchange = Exchange(chance.uniform(10, 1e5), chance.choice((1, 2, 4)), 4096.0, padded=False)
        rate, latency, network = 10 ** chance.uniform(9, 12), chance.uniform(0, 1e-4), 10 ** chance.uniform(9, 12)
        base = _both_ms(exchange, layout, rate, network, latency)
        assert _both_ms(exchange, layout, 2 * rate, network, latency) <= base
        assert _both_ms(exchange, layout, rate, 2 * network, latency) <= base
        assert _both_ms(exchange, layout, rate, network, latency / 2) <= base
        more = dataclasses.replace(exchange, rows=2 * exchange.rows)
        assert base <= _both_ms(more, layout, rate, network, latency)
        wider = dataclasses.replace(layout, world=2 * layout.world)
        assert base <= _both_ms(exchange, wider, rate, network, latency)
