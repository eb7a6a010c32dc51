"""Writes the records of analyses as JSON files, and draws their figures, also from old records."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scmoe_ds import figure_style
from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.errors import AnalysisError, imports_of, one_line, reason_of

KINDS = ("similarity", "gating", "gradients")
"""Sub-commands of scmoe analyze. scmoe adapt --measure writes "adaptation"."""


def heading(kind: str, command: str | None = None) -> dict[str, Any]:
    """The beginning of every record: its kind, the command, versions and date."""
    if command is None:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    packages = {name: _version(name) for name in ("scmoe_ds", "torch", "deepspeed", "transformers")}
    return {
        "kind": kind,
        "command": command,
        "versions": {"python": platform.python_version(), **packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": date.today().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_output(path: str) -> None:
    """Raises an AnalysisError if --output is no .json file in a directory that exists and can be written."""
    out = Path(path)
    if out.suffix != ".json":
        raise AnalysisError(f"--output {out}: must end in .json; the figure gets the same name with .png")
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise AnalysisError(f"--output {out} cannot be written: name a file in a directory that is there")


def save(record: dict[str, Any], path: str) -> list[Path]:
    """Writes a record, and its figure beside it; returns both paths.

    Raises:
        AnalysisError: they cannot be written.
    """
    out = Path(path)
    try:
        # JSON has no NaN: a missing value is null.
        write_whole(out, json.dumps(record, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise AnalysisError(f"--output {out} cannot be written ({reason_of(error)})") from None
    return [out, draw(record, out)]


def draw(record: dict[str, Any], json_path: Path) -> Path:
    """Writes a record's figure beside its JSON file."""
    with imports_of("plots", f"the figure of {json_path}"):
        from scmoe_ds.analysis import figures  # matplotlib takes a second to import

    drawn = {
        "similarity": figures.similarity,
        "gating": figures.gating,
        "gradients": figures.gradients,
        "adaptation": figures.adaptation,
    }
    picture = json_path.with_suffix(".png")
    try:
        figure_style.save(drawn[record["kind"]](record), picture)
    except OSError as error:
        raise AnalysisError(f"{picture} cannot be written ({reason_of(error)})") from None
    return picture


def read_json(flag: str, path: str) -> Any:
    """The JSON file that a flag names. Raises an AnalysisError if it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnalysisError(f"{flag} {path} cannot be read as JSON: {reason_of(error)}") from None


def redraw(path: str, kind: str) -> Path:
    """Draws the figure of a record again. Raises an AnalysisError if the file is no record of that kind."""
    record = read_json("--from-json", path)
    found = record.get("kind") if isinstance(record, dict) else None
    if found != kind:
        remedy = f'; use the sub-command "{found}"' if found in KINDS else ", which scmoe analyze writes"
        raise AnalysisError(f'--from-json {path} is no record of "{kind}"{remedy}')
    try:
        return draw(record, Path(path))
    except AnalysisError:
        raise
    except Exception as error:  # a foreign record may hold anything, and matplotlib raises anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise AnalysisError(f"--from-json {path} is incomplete or damaged ({what}); run the analysis again") from None
