"""Flags of scmoe adapt --measure: what converting each layer costs, and which layers to convert."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags.checks import flag_of
from scmoe_ds.programs.flags.tokenizer import add_tokenizer

_ONLY = """calibration max_loss_increase min_hidden most_similar output_prefix tokenizer_type tokenizer_model vocab_file
merge_file""".split()


def add_measure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("which layers, which position")
    group.add_argument(
        "--measure",
        metavar="TEXT",
        help="a UTF-8 text: measures the loss with each MoE layer converted alone, at every position and join that the "
        "model can have (or at --position and --join), and what each saves",
    )
    group.add_argument("--calibration", metavar="FILE", help='measured times: a "calibration_file"')
    group.add_argument(
        "--max-loss-increase", type=_share, metavar="1%", help="choose layers that save most time within this"
    )
    group.add_argument(
        "--min-hidden", type=_share, metavar="80%", help="choose layers that hide at least this of the communication"
    )
    group.add_argument("--most-similar", type=int, metavar="N", help="choose the N layers with the most similar ends")
    group.add_argument("--output-prefix", metavar="PREFIX", help="writes PREFIX.json, .md, .html and .png")
    add_tokenizer(group, "the one that the source records; of a Hugging Face model its own")


def check_measure(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for a flag that is out of range or goes with another one."""
    if args.measure is None:
        if given := [name for name in _ONLY if getattr(args, name) is not None]:
            raise ArgumentError(f"{flag_of(given[0])} goes with --measure TEXT: add it, or remove the flag")
        return
    if args.layers is not None:
        raise ArgumentError("--layers names the layers, which --measure chooses or leaves open: give one of them")
    if args.shared_expert == "fit":
        raise ArgumentError(
            "--shared-expert fit: depends on which layers are converted; measure mean or busiest, then fit"
        )
    if args.most_similar is not None and (args.max_loss_increase is not None or args.min_hidden is not None):
        raise ArgumentError(
            "--most-similar chooses by similarity alone: give it without --max-loss-increase and --min-hidden"
        )
    if args.output_prefix is not None:
        parent = Path(args.output_prefix).absolute().parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ArgumentError(f"--output-prefix {args.output_prefix}: name files in a directory that is there")


def _share(text: str) -> float:
    """ "1%" or "0.01"."""
    number, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        raise argparse.ArgumentTypeError("write a share such as 1% or 0.01") from None
    if not math.isfinite(share) or not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1, or 0% and 100%")
    return share
