"""Descriptions of clusters: what is read, and what their mistakes are told as."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.gpu import in_units

CURVE = {"points": [["64 KiB", 0.2], ["16 MiB", 0.8]]}
WHOLE: dict[str, Any] = {
    "name": "2 × 8 A800",
    "nodes": 2,
    "gpus_per_node": 8,
    "gpu": "A800-SXM4-80GB",
    "inside": {"kind": "nvlink switch", "rate": "200 GB/s", "latency": "3 us", "efficiency": CURVE},
    "between": {"nics": 4, "nic_rate": "200 Gbit/s", "latency": "8 us", "efficiency": CURVE},
    "sources": {"inside.rate": "NVIDIA's data sheet", "gpu.peak.bf16": "NVIDIA's data sheet"},
}
PCIE = WHOLE | {
    "nodes": 1,
    "gpu": "A30",
    "between": None,
    "inside": WHOLE["inside"] | {"kind": "pcie", "rate": "25 GB/s", "gpus_per_root": 4, "root_rate": "25 GB/s"},
}


def read(whole: object, tmp_path: Path) -> Cluster:
    path = tmp_path / "x.json"
    path.write_text(whole if isinstance(whole, str) else json.dumps(whole), encoding="utf-8")
    return read_cluster(path)


def changed(path: str, value: object, whole: dict[str, Any] = WHOLE) -> dict[str, Any]:
    """A copy with another value at a path; "…" leaves it out."""
    whole = copy.deepcopy(whole)
    *parents, key = path.split("/")
    inner = whole
    for parent in parents:
        inner = inner[parent]
    if value == "…":
        del inner[key]
    else:
        inner[key] = value
    return whole


def test_units_are_read_into_base_units(tmp_path: Path) -> None:
    cluster = read(WHOLE, tmp_path)
    assert cluster.inside.rate == 2e11 and cluster.inside.latency == pytest.approx(3e-6)
    assert cluster.between is not None and cluster.between.nic_rate == 2.5e10
    assert cluster.inside.efficiency.points == ((65536.0, 0.2), (16777216.0, 0.8))
    assert cluster.gpu.name == "NVIDIA A800-SXM4-80GB" and cluster.gpu.peak["bf16"] == pytest.approx(312e12)


def test_a_gpu_may_be_like_another(tmp_path: Path) -> None:
    gpu = {
        "like": "A100",
        "memory": "48 GiB",
        "peak": {"bf16": "250 TFLOP/s"},
        "efficiency": {"rows": {"low": 0.1, "likely": 0.2, "high": 0.3}},
    }
    found = read(changed("gpu", gpu), tmp_path).gpu
    assert found.memory == 48 * 2**30 and found.peak["bf16"] == 250e12 and found.efficiency["rows"].likely == 0.2
    assert found.peak["fp16"] == pytest.approx(312e12) and found.efficiency["product"].likely > 0.5
    assert read(changed("gpu", in_units(found)), tmp_path).gpu == found


MISTAKES: list[tuple[str, object, str]] = [
    ("inside/rate", 25, "inside.rate = 25: must be a number with its unit, such as '25 GB/s'"),
    ("inside/rate", 25.5, "inside.rate = 25.5: must be a number with its unit"),
    ("inside/rate", "25 Gb/s", "inside.rate = \"25 Gb/s\": must be a number with its unit, such as '25 GB/s'; write 'Gbit/s'"),
    ("inside/rate", "-3 GB/s", "and not negative"),
    ("inside/rate", "0 GB/s", "inside.rate = 0 B/s: is less than 20 GB/s"),
    ("inside/rate", "25 Gbit/s", "inside.rate = 3.12 GB/s: is less than 20 GB/s; is its unit right?"),
    ("inside/rate", "1e400 GB/s", "is too large"),
    ("inside/rate", "400 GB/s", "NVLink of A800-SXM4-80GB does 200 GB/s in one direction"),
    ("inside/rate", "9 TB/s", "no NVLink does more than 4 TB/s"),
    ("inside/rate", "…", "inside.rate: is missing"),
    ("inside/rat", "1 GB/s", 'inside.rat: unknown key; did you mean "rate"?'),
    ("inside/kind", "nvswitch", "inside.kind = \"nvswitch\": must be 'nvlink switch', 'nvlink mesh', 'pcie' or 'loopback'"),
    ("inside/kind", "pcie", "inside.gpus_per_root: is missing"),
    ("inside/kind", "loopback", "is for processes on a CPU"),
    ("inside/root_rate", "25 GB/s", 'belongs to "kind": "pcie"'),
    ("inside/efficiency/points", [["1 MiB", 0.5], ["64 KiB", 0.7]], "message sizes must be above 0 and rise"),
    ("inside/efficiency/points", [["1 MiB", 1.5]], "inside.efficiency.points.0.1 = 1.5: must be at most 1"),
    ("inside/efficiency/points", [], "must have at least 1"),
    ("inside/efficiency/spread", 1, "inside.efficiency.spread = 1: must be less than 1"),
    ("gpu", "A80", 'gpu = "A80": no GPU type of this name is known; did you mean "A800"?'),
    ("gpu", "Radeon", "there are GB200, B200"),
    ("gpu", 7, "gpu = 7: must be a name"),
    ("gpu", {"like": "A30", "memry": "2 TB"}, 'gpu.memry: unknown key; did you mean "memory"?'),
    ("gpu", {"like": "A30", "memory": "2 TB"}, "gpu.memory = 2 TB: no GPU has more than 1 TB"),
    ("gpu", {"like": "A30", "peak": {"bf16": "330 PFLOP/s"}}, "give the dense peak, without sparsity"),
    ("gpu", {"like": "A30", "bandwidth": "933 MB/s"}, "gpu.bandwidth = 933 MB/s: is less than 10 GB/s; is its unit right?"),
    ("gpu", {"like": "A30", "efficiency": {"product": {"low": 0.7, "likely": 0.6, "high": 0.8}}}, "must not decrease"),
    ("gpu", {"like": "A30", "efficiency": {"prodct": {"low": 0.5, "likely": 0.6, "high": 0.8}}}, 'did you mean "product"?'),
    ("gpu", {"name": "mine"}, "gpu.memory: is missing"),
    ("between", None, "between: is missing; 2 nodes need a network"),
    ("between/nic_rate", "25 Tbit/s", "between.nic_rate = 25 Tbit/s: no NIC is faster than 1.6 Tbit/s"),
    ("between/nics", 65, "between.nics = 65: no node has more than 64"),
    ("between/oversubscription", 0.5, "must be at least 1"),
    ("nodes", "8", 'nodes = "8": must be a whole number'),
    ("nodes", True, "nodes = true: must be a whole number"),
    ("nodes", 0, "nodes = 0: must be at least 1"),
    ("price", -1, "price = -1: must be at least 0"),
    ("sources/inside.rte", "x", 'sources.inside.rte: names no field; did you mean "inside.rate"?'),
    ("insid", 1, 'insid: unknown key; did you mean "inside"?'),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "said"), MISTAKES)
def test_a_mistake_is_told_by_path(path: str, value: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError) as error:
        read(changed(path, value), tmp_path)
    assert said in str(error.value) and all("x.json: " in line for line in str(error.value).splitlines())


def test_roots_share_the_gpus_evenly(tmp_path: Path) -> None:
    assert read(PCIE, tmp_path).inside.root_rate == 25e9
    with pytest.raises(ClusterError, match="gpus_per_root = 3: must divide gpus_per_node, which is 8"):
        read(changed("inside/gpus_per_root", 3, PCIE), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must be a JSON object, in braces, and is a list"),
        ('{"nodes": 1, "nodes": 2}', '"nodes" is written twice in one object'),
        ('{"price": NaN}', "NaN is no number of JSON"),
        ('{"price": 1e999}', "1e999 is too large for a number"),
        (f'{{"nodes": {"9" * 5000}}}', "is too large for a number"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": 1,\n  x}', "line 2, column 3: is no JSON"),
        ("", "line 1, column 1: is no JSON"),
        (f'{{"name": "{"x" * 2**24}"}}', "has more than 16 MiB"),
    ],
    ids=lambda value: value[:20],
)
def test_files_that_are_none(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError) as error:
        read(text, tmp_path)
    assert said in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"absent\.json: cannot be read \(No such file"):
        read_cluster(tmp_path / "absent.json")
    with pytest.raises(ClusterError, match="cannot be read"):
        read_cluster(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ClusterError, match="is no text in UTF-8"):
        read_cluster(tmp_path / "x.json")
