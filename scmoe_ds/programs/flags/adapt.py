"""Flags of scmoe adapt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ArgumentError
from scmoe_ds.programs.flags import adapt_report
from scmoe_ds.programs.flags.adapt_measure import add_measure, check_measure
from scmoe_ds.programs.flags.checks import check_ranges
from scmoe_ds.programs.flags.parser import FlagParser

_POSITIONS = ["pos1", "pos2", "pos3"]
_OFTEN = """output position join layers merge top-k measure calibration max-loss-increase min-hidden most-similar
output-prefix shared-expert text-file seq-length""".split()


class _Parser(FlagParser):
    """`scmoe adapt report …` is a command of its own, beside `scmoe adapt SOURCE …`."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] == ["report"]:
            return adapt_report.build_parser().parse_args(words[1:], namespace)
        return super().parse_args(words, namespace)


def build_parser() -> FlagParser:
    """The command line."""
    parser = _Parser(
        prog="scmoe adapt",
        description="Make a trained MoE model a ScMoE: the weights are kept, the routed experts read a preceding "
        "layer. scmoe pretrain --load goes on with the result.",
        example="scmoe adapt checkpoints/top2 --output scmoe --position pos2 --join late",
        often=[f"--{name}" for name in _OFTEN],
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a checkpoint, a directory of them (the latest), an export, or a Hugging Face model's directory",
    )
    parser.add_argument("--output", type=Path, help="an empty or new directory for the weights")
    parser.set_defaults(command="adapt")
    _add_model(parser)
    add_measure(parser)
    group = parser.add_argument_group("shared expert", "of a source that has none")
    group.add_argument(
        "--shared-expert",
        choices=["mean", "busiest", "fit", "none"],
        help="starts from the mean of a layer's experts (default), from the one that a text keeps busiest, or fitted "
        "to what the change takes away; none: of a Hugging Face model (its default)",
    )
    group.add_argument(
        "--text-file", help="a UTF-8 text, for --shared-expert busiest and fit, and the losses of a Hugging Face model"
    )
    group = parser.add_argument_group("how a text is read")
    group.add_argument("--seq-length", type=int, help="tokens of a sequence; default: the model's context")
    group.add_argument("--batch-size", type=int, default=8, help="sequences of a batch")
    group.add_argument("--max-tokens", type=int, help="most tokens to read; default: all")
    group = parser.add_argument_group("files")
    group.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="default: fp32, of a Hugging Face model its own"
    )
    group.add_argument("--shard-gb", type=float, default=5.0, help="size of a file, in 10^9 bytes")
    group.add_argument("--format", choices=["scmoe", "hf"], default="scmoe", help="hf: transformers loads it, too")
    group = parser.add_argument_group(
        "dense source", "Llama and Mistral (→ Mixtral), Qwen2, Qwen3 (→ their MoE families)"
    )
    group.add_argument(
        "--experts", type=int, help="of each MoE layer, copies of its MLP; --top-k of them, 2 by default"
    )
    group.add_argument("--noise", type=float, default=0.0, help="on the experts' weights, relative to their size")
    group.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises an ArgumentError for flags that are out of range, or that do not go together."""
    check_ranges(args)
    check_measure(args)
    output = args.output
    if output is not None and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ArgumentError(f"--output {output}: is not empty; name another directory")  # before the long part
    if args.output is None and args.measure is None:
        raise ArgumentError(
            "--output is missing: name an empty or new directory for the weights, or give --measure TEXT"
        )
    if args.noise and args.experts is None:
        raise ArgumentError(f"--noise {args.noise}: is for the experts that --experts makes; give both, or none")
    if args.shared_expert in ("busiest", "fit") and args.text_file is None:
        raise ArgumentError(
            f"--shared-expert {args.shared_expert}: is measured on text; name a file by --text-file, or use mean"
        )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the ScMoE")
    group.add_argument(
        "--position", choices=_POSITIONS, help="where the shortcut is taken; default: pos2, of Hugging Face pos1"
    )
    group.add_argument("--first-layer-position", choices=_POSITIONS, help="of the first MoE layer's shortcut")
    group.add_argument("--merge", choices=["add", "cg1", "cg2"], help="default: as in the source, else cg1")
    group.add_argument("--layers", type=int, nargs="+", help="MoE layers to convert, from 0; default: all")
    group.add_argument("--join", choices=["end", "late"], help="late: after the next block's attention; default: end")
    group.add_argument("--top-k", type=int, help="routed experts per token; default: as in the source")
    group.add_argument("--shortcut-norm", choices=["own", "shared"], help="own (default): starts as a copy")
