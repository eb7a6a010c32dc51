"""Flags of scmoe dashboard."""

from __future__ import annotations

from pathlib import Path

from scmoe_ds.programs.flags.parser import FlagParser


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="scmoe dashboard",
        description="Draw what training runs have recorded as one HTML page, which opens without a server: loss, load "
        "of the experts, drops, overlap, throughput. A run may still go on.",
        example="scmoe dashboard checkpoints/scmoe checkpoints/top2 --output compare.html",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="--save directory of a run; several share their charts"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: dashboard.html in the first RUN_DIR")
    return parser
