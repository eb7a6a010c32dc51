"""Flags of scmoe probe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.parser import FlagParser, started_as

PRECISIONS = ("fp32", "bf16", "fp16")


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog=started_as("scmoe probe"),
        description="Measures what a machine computes and sends, in about a minute, and writes the profile that "
        "scmoe plan --profile takes: products, experts, attention and all that memory bounds, by size; collectives "
        "between ranks of one node and of several; computation beside a transfer. A profile of one or two nodes serves "
        "a cluster of many.",
        example="deepspeed --num_accelerators 2 --module scmoe_ds.programs.probe --output profile.json",
        epilog="docs/probe.md says what is measured, and how.",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("profile.json"), metavar="FILE", help="the profile, as JSON"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time for all measurements; more gives more rounds and larger sizes"
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        metavar="NAME",
        help="fp32, bf16, fp16: those that will be trained in (default: all that a GPU has; fp32 on a CPU)",
    )
    parser.add_argument("--details", action="store_true", help="print every kernel, not only the extremes of each kind")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument(
        "--distributed-timeout-minutes", type=float, default=10.0, help="end the job when a collective takes longer"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace]:
    """The flags.

    Raises:
        ArgumentError: a time that is too short or no time.
        SystemExit: argparse's own findings, and --help.
    """
    args = build_parser().parse_args(argv)
    if not 1 <= args.seconds <= 3600:
        raise ArgumentError(
            f"--seconds {args.seconds:g}: must be from 1 to 3600; a minute measures all sizes some ten times"
        )
    return (args,)
