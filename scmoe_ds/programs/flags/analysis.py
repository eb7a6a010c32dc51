"""Flags of scmoe analyze."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from scmoe_ds.errors import AnalysisError
from scmoe_ds.programs.flags.checks import check_ranges, flag_of
from scmoe_ds.programs.flags.model import DTYPES
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.flags.tokenizer import add_tokenizer

_CHECKPOINT = "a checkpoint, a directory of them (its latest), or an export"


def build_parser() -> FlagParser:
    """The parser, with one sub-command for each analysis."""
    parser = FlagParser(
        prog="scmoe analyze",
        description="Analyse a trained GPT: similarity of its representations, choices of its gates, norms and noise "
        "of its gradients. One process on one device; no token is dropped.",
        example="scmoe analyze gating --load checkpoints/gpt --text-file book.txt --output gating.json",
        epilog="scmoe analyze ANALYSIS --help lists its flags.",
    )
    commands = parser.add_subparsers(dest="analysis", required=True, title="analyses")
    similarity = _add(
        commands,
        "similarity",
        "cosine similarity and L2 distance between all intermediate "
        "representations (paper figure 10), and what a shortcut would connect",
    )
    similarity.add_argument("--load", help=_CHECKPOINT)
    similarity.add_argument(
        "--hf-model",
        help="local directory of a Hugging Face causal language model: GPT-2, LLaMA, Mistral, Qwen, GPT-NeoX",
    )
    similarity.add_argument(
        "--moe-every",
        type=int,
        help="an MoE layer in every N-th block; default: as in the model, 2 if it is dense",
    )
    similarity.add_argument("--images", help='for a SwinV2: directory of <class>/<image>, or "digits" of scikit-learn')
    similarity.add_argument("--max-images", type=int, help="most images to read; default: all")
    gating = _add(commands, "gating", "choices, scores, load and drops of the gates (paper figure 9)")
    gating.add_argument("--load", help=_CHECKPOINT)
    gradients = _add(
        commands,
        "gradients",
        "norm and signal-to-noise ratio of the gradients, by sub-layer and branch (paper appendix A.1)",
    )
    gradients.add_argument("--load", action="append", help=_CHECKPOINT + "; give it several times to compare models")
    for command in (gating, gradients):
        command.add_argument(
            "--all-checkpoints",
            action="store_true",
            help="analyse every global_step* in the directory --load, and draw curves over iterations",
        )
    gradients.add_argument(
        "--micro-batches", type=int, default=16, help="number of micro-batches whose gradients are compared"
    )
    feasibility = commands.add_parser(
        "feasibility",
        help="one page: would ScMoE pay for a model on a machine?",
        example="scmoe analyze feasibility --similarity similarity.json --calibration times.json \\\n"
        "      --output-prefix page",
        description="Would ScMoE pay for a model on a machine? Reads two JSON files. Loads no model and needs no GPU.",
    )
    feasibility.add_argument("--similarity", help='a record of the sub-command "similarity" of the model')
    feasibility.add_argument("--calibration", help='measured times: a "calibration_file"')
    feasibility.add_argument("--output-prefix", help="writes <prefix>.md, <prefix>.html and <prefix>.png")
    return parser


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:],
        example=f"scmoe analyze {name} --load checkpoints/gpt --text-file book.txt --output {name}.json",
    )
    group = parser.add_argument_group("record")
    group.add_argument("--output", help="a .json file; the figure goes beside it, as .png")
    group.add_argument("--from-json", help="draw the figure again from such a file; loads no model")
    group = parser.add_argument_group("what is read")
    group.add_argument("--data-path", help="prefix of a .bin and .idx of scmoe preprocess")
    group.add_argument(
        "--split",
        help="with --data-path: the --split of the pretraining; its validation documents are read. "
        "Default: all documents",
    )
    group.add_argument("--text-file", help="a UTF-8 text")
    group.add_argument("--seq-length", type=int, help="tokens of a sequence; default: the model's context")
    group.add_argument("--batch-size", type=int, default=8, help="sequences of a micro-batch")
    if name != "gradients":
        group.add_argument("--max-tokens", type=int, help="most tokens to read; default: all")
    group = parser.add_argument_group("model and tokenizer")
    group.add_argument("--dtype", choices=DTYPES, help="default: as it was trained or exported")
    add_tokenizer(
        group,
        "the one that the checkpoint records, or ByteTokenizer"
        + ("; with --hf-model its own" if name == "similarity" else ""),
    )
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the flags of an analysis of a model, and sets the tokenizer that they leave open.

    Raises:
        AnalysisError, ArgumentError: a setting that its user can correct.
    """
    from scmoe_ds.analysis.records import check_output  # imports torch

    check_ranges(args)
    if args.from_json is not None:
        return
    is_similarity = args.analysis == "similarity"
    _require_one(args, ["load", "hf_model"] if is_similarity else ["load"])
    _require_one(args, ["data_path", "text_file", "images"] if is_similarity else ["data_path", "text_file"])
    if args.split is not None and args.data_path is None:
        raise AnalysisError("--split is of a data set: give --data-path as well, or leave it out")
    if args.output is None:
        raise AnalysisError("--output is missing: name a .json file for the record")
    check_output(args.output)
    if args.tokenizer_type is None and getattr(args, "hf_model", None) is not None:
        args.tokenizer_type = "HuggingFaceTokenizer"
        args.tokenizer_model = args.tokenizer_model or args.hf_model


def _require_one(args: argparse.Namespace, names: Sequence[str]) -> None:
    flags = " or ".join(map(flag_of, names))
    given = sum(bool(getattr(args, name)) for name in names)
    if given != 1:
        raise AnalysisError(f"{flags} is missing" if not given else f"{flags}: give one of them, not several")
