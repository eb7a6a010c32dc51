"""Draws what training runs have recorded as one HTML page. The flags are in flags/dashboard.py."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scmoe_ds.errors import AnalysisError, one_line
from scmoe_ds.figure_style import short_names
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.dashboard import build_parser
from scmoe_ds.training.record import FILE_NAME, RunRecord, read_record


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_alone("scmoe dashboard", lambda: _write(args), argv)


def _write(args: argparse.Namespace) -> None:
    from scmoe_ds.analysis.dashboard import page

    runs = {os.path.abspath(_directory(path)): read_run(path) for path in args.runs}
    names = short_names(runs)
    out = args.output or _directory(args.runs[0]) / "dashboard.html"
    try:
        text = page({names[path]: run for path, run in runs.items()})
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # a foreign record may hold anything
        what = f"{type(error).__name__}: {one_line(error)}"
        raise AnalysisError(f"{FILE_NAME} of {', '.join(runs)} is damaged or of another program ({what})") from None
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AnalysisError(f"{out} cannot be written ({error.strerror}): name another --output") from None
    print(f"wrote {out}: open it in a browser")


def _directory(path: Path) -> Path:
    return path.parent if path.name == FILE_NAME else path


def read_run(path: Path) -> RunRecord:
    """The record of a --save directory. Raises an AnalysisError if there is none."""
    try:
        record = read_record(path)
    except FileNotFoundError:
        what = f"has no {FILE_NAME}" if path.is_dir() else "is not there"
        raise AnalysisError(f"{path} {what}: name the --save directory of a training run") from None
    except OSError as error:
        raise AnalysisError(f"{path} cannot be read ({error.strerror})") from None
    if not record.starts and not record.steps:
        raise AnalysisError(f"{path} has no entry of a training run in its {FILE_NAME}: name another directory")
    return record


if __name__ == "__main__":
    sys.exit(main())
