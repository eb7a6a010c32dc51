"""Write ds_configs/scmoe.schema.json, the JSON Schema of a DeepSpeed JSON with a "scmoe" section.

    python -m scmoe_ds.config.schema            # after a change of scmoe_ds/config/section.py
    python -m scmoe_ds.config.schema --check    # exit code 1 if the file is missing or stale; writes nothing

Editors complete and check the section with it. It knows each field alone; rules that span fields (divisibility,
positions, slots) are checked when a run starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scmoe_ds.config.section import ScMoEConfig

SCHEMA = Path("ds_configs", "scmoe.schema.json")


def json_schema() -> dict[str, Any]:
    """JSON Schema of a DeepSpeed file with a "scmoe" section, for editors; other keys are left to DeepSpeed."""
    section = ScMoEConfig.model_json_schema()
    section["description"] = "ScMoE layers: architecture, routing, expert parallelism and overlap."
    definitions = section.pop("$defs", {})
    for each in definitions.values():
        each["description"] = each["description"].splitlines()[0]  # what follows in the docstring are its fields
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "DeepSpeed JSON with a scmoe section",
        "type": "object",
        "properties": {"scmoe": section},
        "required": ["scmoe"],
        "$defs": definitions,
    }


def keep(schema: Mapping[str, Any], path: Path, module: str, argv: Sequence[str] | None) -> int:
    """Writes a JSON Schema, or says whether its file is current; returns the exit code.

    Args:
        module: the command.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="Write a JSON Schema.")
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if the file is stale")
    parser.add_argument("--output", type=Path, default=path, help="default: %(default)s")
    args = parser.parse_args(argv)
    text = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    if not args.check:
        args.output.write_text(text, encoding="utf-8")
        print(f"wrote {args.output}")
        return 0
    if args.output.is_file() and args.output.read_text(encoding="utf-8") == text:
        return 0
    state = "stale" if args.output.is_file() else "missing"
    print(f"{args.output} is {state}; run: python -m {module}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return keep(json_schema(), SCHEMA, "scmoe_ds.config.schema", argv)


if __name__ == "__main__":
    sys.exit(main())
