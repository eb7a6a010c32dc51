"""ds_configs/scmoe.schema.json: every file of ds_configs/ obeys it, wrong fields do not, and it is current."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "ds_configs").glob("*.json") if path.name != "scmoe.schema.json")
SCHEMA = json.loads((ROOT / "ds_configs" / "scmoe.schema.json").read_text(encoding="utf-8"))


def schema_errors(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """What a JSON Schema validator would find, for the keywords that pydantic writes here; refuses others."""
    known = {
        "title",
        "description",
        "default",
        "$schema",
        "$defs",
        "required",
        "$ref",
        "anyOf",
        "enum",
        "const",
        "type",
        "minimum",
        "exclusiveMinimum",
        "items",
        "properties",
        "additionalProperties",
    }
    assert set(schema) <= known, f"{path}: teach schema_errors {set(schema) - known}"
    if "$ref" in schema:
        return schema_errors(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], path)
    if "anyOf" in schema:
        found = [schema_errors(value, option, path) for option in schema["anyOf"]]
        return [] if [] in found else [error for errors in found for error in errors]
    types: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    if "type" in schema:
        wrong = not isinstance(value, types[schema["type"]])
        if wrong or (isinstance(value, bool) and schema["type"] in ("integer", "number")):
            return [f"{path}: {value!r} is not of type {schema['type']}"]
    broken = [
        f"{path}: {value!r} is not one of {schema[key]!r}"
        for key in ("enum", "const")
        if key in schema and value not in (schema[key] if key == "enum" else [schema[key]])
    ]
    if "minimum" in schema and value < schema["minimum"]:
        broken.append(f"{path}: {value!r} is below {schema['minimum']}")
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        broken.append(f"{path}: {value!r} must exceed {schema['exclusiveMinimum']}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            broken += schema_errors(item, schema.get("items", {}), f"{path}[{index}]")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        broken += [f"{path}.{key} is missing" for key in schema.get("required", []) if key not in value]
        for key, item in value.items():
            if key in properties:
                broken += schema_errors(item, properties[key], f"{path}.{key}")
            elif schema.get("additionalProperties", True) is False:
                broken.append(f"{path}.{key}: unknown key")
    return broken


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
