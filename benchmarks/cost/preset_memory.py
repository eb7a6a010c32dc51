"""The memory of ds_configs/README.md: `scmoe check` of every file there, as it is and as a standard top-2 MoE.

python -m benchmarks.cost.preset_memory [PART OF A FILE NAME …]
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from scmoe_ds.programs.check import main

DIRECTORY = Path(__file__).parents[2] / "ds_configs"
ROW = re.compile(r"\| `(\w+_\d+xA\d+\.json)` \| ([\w-]+)")
"""Of the table: file and preset."""


def table() -> dict[str, tuple[str, str]]:
    """Of each file its preset, and what the last column says."""
    rows = [line for line in (DIRECTORY / "README.md").read_text("utf-8").splitlines() if ROW.match(line)]
    found = {line: ROW.match(line) for line in rows}
    return {match[1]: (match[2], line.split("|")[-2].strip()) for line, match in found.items() if match}


def needed_gb(name: str, preset: str, architecture: str, *flags: str) -> float:
    """GB that a rank needs.

    Args:
        name: of a file.
        preset, flags: of the command.
        architecture: in the place of the file's.
    """
    whole = json.loads((DIRECTORY / name).read_text("utf-8"))
    whole["scmoe"]["architecture"] = architecture
    with tempfile.TemporaryDirectory() as directory:
        source, found = Path(directory, name), Path(directory, "found.json")
        source.write_text(json.dumps(whole), "utf-8")
        code = main(["--deepspeed_config", str(source), "--preset", preset, "--json", str(found), *flags])
        if code:
            raise SystemExit(code)
        return float(json.loads(found.read_text("utf-8"))["needed_bytes"]) / 1e9


def column(name: str, preset: str) -> str:
    """What the last column of the table has to say."""
    return " / ".join(f"{needed_gb(name, preset, architecture):.0f}" for architecture in ("scmoe", "topk"))


if __name__ == "__main__":
    for file, (model, shown) in table().items():
        if not sys.argv[1:] or any(part in file for part in sys.argv[1:]):
            print(f"{file}: {column(file, model)} (the table has {shown})", flush=True)
