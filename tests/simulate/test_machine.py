"""A cluster in its three cases, and with what a profile measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.cards import GPUS
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.collectives import all_to_all_ms, reduce_ms
from scmoe_ds.simulate.gpu import Measured
from scmoe_ds.simulate.interconnect import Curve
from scmoe_ds.simulate.json_files import read_as
from scmoe_ds.simulate.kernels import kernel_ms
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import Machine, cluster_of, machine_of
from scmoe_ds.simulate.profile import Collective, CollectiveTimes, Profile
from scmoe_ds.simulate.work import Exchange, Kernel

CLUSTERS = Path(__file__).parents[2] / "clusters"
DESCRIBED = read_cluster(CLUSTERS / "2x8xA800-4x200g.json")
TWICE = {"collective": "all-gather", "ranks": 2, "ms": [[8.0, 1.0], [8.0, 1.0]]}
SIZES = tuple(4.0**n for n in range(5, 15))


def really(nodes: int, gpus_per_node: int = 8) -> Machine:
    """What the description does not know: slower links, other latencies."""
    assert DESCRIBED.between is not None
    inside = {"rate": 1.6e11, "latency": 9e-6, "efficiency": Curve(points=((2.0**14, 0.1), (2.0**24, 0.9)))}
    between = {"nic_rate": 1.5e10, "latency": 2e-5, "efficiency": Curve(points=((2.0**14, 0.3), (2.0**22, 0.8)))}
    links = {
        "inside": DESCRIBED.inside.model_copy(update=inside),
        "between": DESCRIBED.between.model_copy(update=between) if nodes > 1 else None,
    }
    return machine_of(DESCRIBED.model_copy(update=links | {"nodes": nodes, "gpus_per_node": gpus_per_node}))


def ms(machine: Machine, collective: Collective, ranks: int, size: float) -> float:
    layout = Layout(ranks, expert_parallel=ranks)
    if collective == "all-to-all":
        return all_to_all_ms(Exchange(size, 1, 1.0, padded=True), layout, machine, ranks)[0]
    return reduce_ms(collective, size, "dp", layout, machine)[0]


def times(collective: Collective, nodes: int) -> CollectiveTimes:
    machine, ranks = really(nodes), 8 * nodes
    points = tuple((size, ms(machine, collective, ranks, size)) for size in SIZES)
    return CollectiveTimes(collective=collective, ranks=ranks, nodes=nodes, ms=points, spread=0.2)


def profile(**changed: Any) -> Profile:
    """As the probe would write it on two such nodes."""
    table = [
        Measured(kind="product", shape=(4096, 1024, 4096), share=0.9, phase="forward", precision="bf16"),
        Measured(kind="product", shape=(256, 1024, 1024), share=0.2, phase="forward", precision="bf16"),
        Measured(kind="rows", shape=(2**26, 1, 1), share=0.4),
    ]
    whole = {
        "device": "NVIDIA A800-SXM4-80GB",
        "date": "2026-11-28",
        "capability": (8, 0),
        "memory": 79.3 * 2**30,
        "nodes": 2,
        "gpus_per_node": 8,
        "peak": {"bf16": 2.5e14},
        "bandwidth": 1.7e12,
        "launch": 8e-6,
        "table": table,
        "collectives": [times(each, nodes) for each in get_args(Collective) for nodes in (1, 2)],
        "slowed_by": 1.2,
    }
    return Profile.model_validate(whole | changed)


def test_low_is_slower_than_likely_and_high_is_faster() -> None:
    kernel = Kernel("product", 2 * 4096.0**3, 6 * 4096.0**2, (4096, 4096, 4096))
    low, likely, high = (machine_of(DESCRIBED, case=case) for case in ("low", "likely", "high"))
    by_kernel = [kernel_ms(kernel, each, "bf16")[0] for each in (low, likely, high)]
    by_link = [ms(each, "all-to-all", 16, 2.0**26) for each in (low, likely, high)]
    for times_ in (by_kernel, by_link):
        assert times_[0] > times_[1] > times_[2]
    ampere = DESCRIBED.gpu.efficiency["product"]
    assert by_kernel[0] / by_kernel[2] == pytest.approx(ampere.high / ampere.low, rel=0.01)
    spread = DESCRIBED.between.efficiency.spread if DESCRIBED.between else 0
    assert by_link[0] / by_link[2] == pytest.approx((1 + spread) ** 2, rel=0.05)


@pytest.mark.parametrize("collective", get_args(Collective))
@pytest.mark.parametrize("nodes", [1, 2])
def test_measured_times_come_out_again(collective: Collective, nodes: int) -> None:
    machine = machine_of(DESCRIBED.model_copy(update={"nodes": nodes}), profile())
    for size, measured in times(collective, nodes).ms:
        assert ms(machine, collective, 8 * nodes, size) == pytest.approx(measured, rel=0.05 if size > 1e5 else 0.3), (
            size
        )


@pytest.mark.parametrize("collective", get_args(Collective))
def test_two_measured_nodes_speak_for_sixteen(collective: Collective) -> None:
    machine, truth = machine_of(DESCRIBED.model_copy(update={"nodes": 16}), profile()), really(16)
    for size in (2.0**24, 2.0**28):
        expected = ms(truth, collective, 128, size)
        assert ms(machine, collective, 128, size) == pytest.approx(expected, rel=0.1), size
        assert ms(machine_of(truth.cluster), collective, 128, size) == pytest.approx(expected)


def test_measured_kernels_replace_described_ones() -> None:
    machine = machine_of(DESCRIBED, profile())
    for shape, share in (((4096, 1024, 4096), 0.9), ((256, 1024, 1024), 0.2)):
        rows, inner, columns = shape
        flops = 2.0 * rows * inner * columns
        found, _ = kernel_ms(Kernel("product", flops, 1.0, shape), machine, "bf16")
        assert found == pytest.approx(1e3 * flops / (2.5e14 * share))
    rows_ms, _ = kernel_ms(Kernel("rows", 0.0, 2.0**26), machine, "bf16")
    assert rows_ms == pytest.approx(1e3 * 2**26 / (1.7e12 * 0.4))
    assert machine.slowed_by == 1.2 and machine.profiled and machine.cluster.gpu.launch == 8e-6
    # A kind that was not measured keeps its time: its share is of a peak that is now another.
    attention = machine.cluster.gpu.efficiency["attention"].likely * machine.cluster.gpu.peak["bf16"]
    described = DESCRIBED.gpu.efficiency["attention"].likely * DESCRIBED.gpu.peak["bf16"]
    assert attention == pytest.approx(described)


def test_a_profile_of_other_gpus_is_refused() -> None:
    with pytest.raises(ClusterError, match="device = NVIDIA H100 80GB HBM3: the cluster has NVIDIA A800-SXM4-80GB"):
        machine_of(DESCRIBED, profile(device="NVIDIA H100 80GB HBM3"))
    with pytest.raises(ClusterError, match="device = AMD EPYC: the cluster has"):
        machine_of(DESCRIBED, profile(device="AMD EPYC", capability=(0, 0)))


def test_a_cluster_of_a_profile_alone() -> None:
    found = cluster_of(profile(), nodes=4)
    assert (found.nodes, found.gpus_per_node, found.gpu.name) == (4, 8, "NVIDIA A800-SXM4-80GB")
    assert found.gpu.multiprocessors == GPUS["A800-SXM4-80GB"].multiprocessors
    # One NIC stands for four: what leaves a node is what was measured.
    expected = ms(really(4), "all-to-all", 32, 2.0**28)
    assert ms(machine_of(found, profile()), "all-to-all", 32, 2.0**28) == pytest.approx(expected, rel=0.1)
    assert Cluster.model_validate(found.model_dump()) == found


def test_a_profile_that_has_too_little() -> None:
    near = profile(collectives=[times("all-to-all", 1)])
    assert cluster_of(near).nodes == 1
    with pytest.raises(ClusterError, match="nodes = 2: the profile has no all-to-all between nodes"):
        cluster_of(near, nodes=2)
    with pytest.raises(ClusterError, match="gpus_per_node = 8: the profile has no all-to-all inside a node"):
        cluster_of(profile(collectives=[]))
    assert cluster_of(profile(collectives=[]), gpus_per_node=1).gpus_per_node == 1


def test_a_profile_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile().model_dump_json(), "utf-8")
    assert read_as(Profile, path, ClusterError) == profile()
    whole = json.loads(path.read_text("utf-8"))
    for changed, said in (
        ({"profile": 2}, "profile = 2: must be 1"),
        ({"bandwidth": -1}, "bandwidth = -1: must be more than 0"),
        ({"peak": {}}, "peak = {}: must have at least 1"),
        ({"devise": "A800"}, 'devise: unknown key; did you mean "device"?'),
        ({"collectives": [TWICE]}, "collectives.0.ms = [[8.0, 1.0], [8.0, 1.0]]: bytes must rise"),
    ):
        path.write_text(json.dumps(whole | changed), "utf-8")
        with pytest.raises(ClusterError) as error:
            read_as(Profile, path, ClusterError)
        assert said in str(error.value)
