"""ds_configs/scmoe.schema.json: every file of ds_configs/ obeys it, wrong fields do not, and it is current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.json_schema import schema_errors

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.name != "scmoe.schema.json")
SCHEMA = json.loads((ROOT / "ds_configs" / "scmoe.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_validates_against_the_schema(path: Path) -> None:
    assert schema_errors(json.loads(path.read_text(encoding="utf-8")), SCHEMA) == []


@pytest.mark.parametrize(
    ("section", "finding"),
    [
        ({"positon": "pos2"}, "$.scmoe.positon: unknown key"),
        ({"position": "pos4"}, "$.scmoe.position: 'pos4' is not one of"),
        ({"num_experts": [8, "16"]}, "$.scmoe.num_experts[1]: '16' is not of type integer"),
        ({"moe_every": 0}, "$.scmoe.moe_every: 0 is below 1"),
        ({"capacity_factor": 0}, "$.scmoe.capacity_factor: 0 must exceed 0"),
        ({"post_norm": "yes"}, "$.scmoe.post_norm: 'yes' is not of type boolean"),
        ({"overlap": {"slot": 1}}, "$.scmoe.overlap.slot: unknown key"),
        ({"overlap": {"expert_slot": "automatic"}}, "$.scmoe.overlap.expert_slot: 'automatic' is not one of"),
    ],
)
def test_schema_finds_wrong_fields(section: dict[str, Any], finding: str) -> None:
    assert any(error.startswith(finding) for error in schema_errors({"scmoe": section}, SCHEMA))


def write_schema(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scmoe_ds.config.schema", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_schema_file_is_current() -> None:
    done = write_schema("--check")
    assert done.returncode == 0, done.stderr


def test_stale_schema_is_found_and_rewritten(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    assert write_schema("--check", "--output", str(schema), cwd=tmp_path).returncode == 1
    schema.write_text(json.dumps(SCHEMA | {"title": "old"}), encoding="utf-8")
    stale = write_schema("--check", "--output", str(schema), cwd=tmp_path)
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert write_schema("--output", str(schema), cwd=tmp_path).returncode == 0
    assert json.loads(schema.read_text(encoding="utf-8")) == SCHEMA
