"""clusters/: every description is read, obeys the schema, has a source for every figure, and a row in the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.programs import cluster_schema
from scmoe_ds.simulate.cluster import Cluster, read_cluster
from scmoe_ds.simulate.units import in_words
from tests.helpers.json_schema import schema_errors

ROOT = Path(__file__).parents[2]
CLUSTERS = sorted(path for path in (ROOT / "clusters").glob("*.json") if path.name != "cluster.schema.json")
SCHEMA = json.loads((ROOT / "clusters" / "cluster.schema.json").read_text("utf-8"))
PLAIN = {"$schema", "name", "nodes", "gpus_per_node", "kind", "sources"}


def row_of(path: Path, cluster: Cluster) -> str:
    """The cluster's row of the README."""
    peaks = cluster.gpu.peak
    network = "–"
    if cluster.between:
        network = (
            f"{cluster.between.nics} × {in_words(8 * cluster.between.nic_rate, 'bit/s')}, {cluster.between.topology}"
        )
    cells = [
        f"[{path.name}]({path.name})",
        f"{cluster.nodes} × {cluster.gpus_per_node}",
        cluster.gpu.name,
        in_words(peaks.get("bf16", peaks["fp32"]), "FLOP/s"),
        in_words(cluster.gpu.memory / 2**30 * 1e9, "B").replace("GB", "GiB"),
        f"{cluster.inside.kind}, {in_words(cluster.inside.rate, 'B/s')}",
        network,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_description(path: Path) -> None:
    cluster, whole = read_cluster(path), json.loads(path.read_text("utf-8"))
    assert schema_errors(whole, SCHEMA) == []
    assert [each for each in figures(whole) if not has_source(each, whole["sources"])] == []
    row = row_of(path, cluster)
    assert row in (ROOT / "clusters" / "README.md").read_text("utf-8").splitlines(), f"clusters/README.md lacks:\n{row}"


def figures(part: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in part.items():
        if isinstance(value, dict) and key != "sources":
            found += figures(value, f"{before}{key}.")
        elif key not in PLAIN:
            found.append(before + key)
    return found


def has_source(path: str, sources: dict[str, str]) -> bool:
    parts = path.split(".")
    return any(sources.get(".".join(parts[:count])) for count in range(1, len(parts) + 1))


def test_the_readme_has_no_other_rows() -> None:
    rows = [
        line for line in (ROOT / "clusters" / "README.md").read_text("utf-8").splitlines() if line.startswith("| [")
    ]
    assert len(rows) == len(CLUSTERS) >= 16


def test_the_schema_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cluster_schema.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("path", "value", "finding"),
    [
        (("inside", "rate"), "25", "$.inside.rate: '25' does not match"),
        (("inside", "rate"), 25, "$.inside.rate: 25 is not of type string"),
        (("inside", "kind"), "nvswitch", "$.inside.kind: 'nvswitch' is not one of"),
        (("gpu",), "A80", "$.gpu: 'A80' is not one of"),
        (("gpu",), {"like": "A30", "memry": "2 GB"}, "$.gpu.memry: unknown key"),
        (("nodes",), 0, "$.nodes: 0 is below 1"),
        (("between", "oversubscription"), 65, "$.between.oversubscription: 65 is above 64"),
        (("insid",), 1, "$.insid: unknown key"),
    ],
)
def test_the_schema_finds_wrong_fields(path: tuple[str, ...], value: object, finding: str) -> None:
    whole = json.loads((ROOT / "clusters" / "2x8xA800-8x100g.json").read_text("utf-8"))
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert any(error.startswith(finding) for error in schema_errors(whole, SCHEMA))
