"""Flags of scmoe adapt report."""

from __future__ import annotations

from pathlib import Path

from scmoe_ds.programs.flags.parser import FlagParser

_RECORD = "what scmoe evaluate --output wrote; give it several times for several texts and tasks"


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="scmoe adapt report",
        description="One page on a model that became a ScMoE: losses, tasks, speed and costs, of teacher and student. "
        "Reads records. Loads no model and needs no GPU.",
        example="scmoe adapt report checkpoints/student --teacher-run checkpoints/teacher \\\n"
        "      --teacher teacher.json --after student.json --output-prefix report",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="--save directory of the student's training; several in their order, each of which goes on with the last",
    )
    parser.add_argument(
        "--output-prefix", default="adapt_report", help="writes <prefix>.md, <prefix>.html and <prefix>.png"
    )
    parser.add_argument("--teacher-run", type=Path, help="--save directory of the teacher's training")
    parser.add_argument("--teacher", action="append", metavar="FILE", help=f"of the teacher: {_RECORD}")
    parser.add_argument("--before", action="append", metavar="FILE", help="the same of the student before its training")
    parser.add_argument("--after", action="append", metavar="FILE", help="the same of the student after it")
    parser.set_defaults(command="report")
    return parser
