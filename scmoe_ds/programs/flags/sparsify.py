"""Flags of scmoe sparsify."""

from __future__ import annotations

import argparse
from pathlib import Path

from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.checks import check_output_directory, check_ranges
from scmoe_ds.programs.flags.model import DTYPES
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.tokenizer import add_tokenizer

MEASURES = ("gate", "abs-gate", "gate-up", "abs-gate-up")
"""Those of scmoe_ds.sparse.importance, which imports torch."""


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="scmoe sparsify",
        description="Calibrate on text what a trained MoE model can leave out (DualSparse-MoE): its experts' neurons "
        "are sorted by importance, without a change of what they compute, and sparsity.json beside them says which "
        "threshold of the gate's score drops which share of the computation. scmoe generate and scmoe evaluate "
        "--drop-rate read it; for a Hugging Face model, attach_dropping in Python does (docs/sparse.md).",
        example="scmoe sparsify --load checkpoints/gpt --text-file book.txt --rate 0.25 --output sparse",
        often="--load --text-file --output --rate --measure --spread --max-tokens --seq-length --batch-size".split(),
    )
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument(
        "--load",
        type=Path,
        required=True,
        help="a checkpoint, a directory of them (its latest), an export, or a Hugging Face MoE model",
    )
    group.add_argument("--output", type=Path, required=True, help="an empty or new directory")
    group.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as it was trained or exported")
    add_tokenizer(group, "the one beside the model; ByteTokenizer where a checkpoint records none")
    group = parser.add_argument_group("calibration")
    group.add_argument("--text-file", "--text", required=True, help="a UTF-8 text of the kind that the model will read")
    group.add_argument("--max-tokens", type=int, default=65536, help="most tokens to read")
    group.add_argument("--seq-length", type=int, help="tokens of a sequence; default: the model's context, up to 2048")
    group.add_argument("--batch-size", type=int, default=8, help="sequences that are read together")
    group.add_argument(
        "--measure",
        choices=MEASURES,
        default="abs-gate",
        help="of a neuron's importance, summed over tokens: act(W1 x), its size, or either times W3 x",
    )
    group.add_argument(
        "--rate",
        type=float,
        default=0.25,
        help="share of the routed experts' computation to leave out from now on, unless --drop-rate says otherwise",
    )
    group.add_argument(
        "--spread",
        type=float,
        help="2T-Drop skips below T - spread and halves below T + spread; default: 0.1 / routed experts of a token",
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags that are out of range."""
    check_ranges(args)
    if not 0 < args.rate < 1:
        raise ArgumentError(f"--rate {args.rate:g}: must be above 0 and below 1; 0.25 leaves a quarter out")
    if args.spread is not None and not 0 <= args.spread < 1:
        raise ArgumentError(
            f"--spread {args.spread:g}: must be at least 0 and below 1, as the scores that it is added to"
        )
    check_output_directory("--output", args.output)
