"""Flags of scmoe plan: a cluster, a model, what is decided already, and what is asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import SWIN_PRESETS
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.simulate.model import MOST, MOST_LAYERS

OFTEN = """
    --cluster --preset --model --deepspeed_config --seq-length --nodes --global-batch-size --tokens --expert-parallel
    --tensor-parallel --zero-stage --micro-batch --recompute-granularity --profile --skew --expert-counts --scale
    --explain --write --html --json
    """.split()


_MOST_NODES = 10**6
_DRAWINGS = (".json", ".png", ".svg", ".pdf")


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="scmoe plan",
        description="Which method, layout and batch train a model fastest on a cluster that you do not have yet? "
        "Simulates a training step from descriptions of both; nothing is measured, and neither torch nor a GPU is "
        "needed. Every number has an interval: how far off it may be.",
        example="scmoe plan --cluster clusters/2x8xA800-8x100g.json --preset gpt2-moe-medium --tokens 300e9",
        epilog="docs/plan.md says what is assumed, and how far it was right where it could be checked.",
        often=OFTEN,
    )
    for add in (_add_machine, _add_model, _add_decided, _add_asked):
        add(parser)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--cluster", metavar="FILE", help="description, as those in clusters/; default: nodes as --profile measured"
    )
    group.add_argument("--nodes", type=_count(_MOST_NODES), help="another number of such nodes")
    group.add_argument("--profile", type=Path, metavar="FILE", help="what scmoe probe measured on one of its nodes")
    routing = group.add_mutually_exclusive_group()
    routing.add_argument(
        "--skew",
        type=_number("must be a number from 1 on", lambda value: 1 <= value <= 1e6),
        metavar="X",
        help="load of the busiest rank over the mean; default: chance alone",
    )
    routing.add_argument("--expert-counts", metavar="FILE", help="a run's log.jsonl, or rows per expert as JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model: one of --preset, --model and sizes")
    names = [*PRESETS, *SWIN_PRESETS]
    group.add_argument("--preset", choices=names, metavar="NAME", help=f"one of {names[0]}, ..., {names[-1]}")
    group.add_argument(
        "--model", metavar="NAME", help="Hugging Face model: name, directory, config.json; or sizes as JSON"
    )
    group.add_argument("--num-layers", type=_count(MOST_LAYERS), help="Transformer blocks")
    group.add_argument("--hidden-size", type=_count(), help="width of the residual stream")
    group.add_argument("--ffn-hidden-size", type=_count(), help="default: 4 * hidden, or 8/3 with --swiglu")
    group.add_argument("--num-attention-heads", type=_count(), help="query heads")
    group.add_argument("--num-key-value-heads", type=_count(), help="default: as many as query heads")
    group.add_argument("--seq-length", type=_count(), help="tokens per training sequence")
    group.add_argument("--swiglu", action="store_true", default=None, help="SwiGLU instead of GELU")
    group.add_argument("--vocab-size", type=_count(), help="of the tokenizer")
    group.add_argument("--num-experts", type=_count(), help="routed experts of an MoE layer")
    group.add_argument("--topk", type=_count(), help="routed experts per token, without a shared one")
    group.add_argument("--expert-interval", type=_count(), help="an MoE in every n-th block")
    group.add_argument("--moe-ffn-hidden-size", type=_count(), help="width of a routed expert")


def _add_decided(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is decided; the rest is searched")
    group.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; what it says is decided")
    group.add_argument(
        "--global-batch-size",
        type=_count(),
        help="samples of all ranks in a step; default: 524288 tokens, or 1024 images",
    )
    group.add_argument(
        "--expert-parallel", "--moe-expert-parallel-size", type=_count(), help="ranks that share experts"
    )
    group.add_argument(
        "--tensor-parallel", "--tensor-model-parallel-size", type=_count(), help="ranks that share a layer"
    )
    group.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], help="of DeepSpeed")
    group.add_argument("--micro-batch", "--micro-batch-size", type=_count(), help="samples per rank in a forward pass")
    group.add_argument(
        "--recompute-granularity", choices=["none", "selective", "full"], help="activation checkpointing"
    )
    group.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="default: bf16")


def _add_asked(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is asked")
    group.add_argument(
        "--tokens",
        type=_number("must be a number above 0 and below 1e18", lambda value: 0 < value < 1e18),
        metavar="N",
        help="of the whole training, for GPU hours and cost; images: samples (default: 1e9)",
    )
    group.add_argument(
        "--scale", type=_scale, metavar="FROM:TO", help="weak and strong scaling, GPUs from and to: 8:4096"
    )
    group.add_argument("--explain", metavar="ROW", help="a step of this row in time, on the lanes it runs on")
    group.add_argument(
        "--timeline", type=_drawing, metavar="FILE", help="that step as .json for Perfetto, or .png, .svg, .pdf"
    )
    group.add_argument("--fit", type=Path, metavar="FILE", help="measured steps: which figure of the cluster is wrong?")
    group.add_argument("--write", type=Path, metavar="FILE", help="DeepSpeed JSON of the recommended row, or of --row")
    group.add_argument("--row", metavar="ROW", help="another row for --write: its name, as the table has it")
    group.add_argument("--html", type=Path, metavar="FILE", help="all of it as one page that loads nothing")
    group.add_argument("--json", type=Path, metavar="FILE", help="all of it for programs")


def _number(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(rule) from None
        if not holds(value):
            raise argparse.ArgumentTypeError(rule)
        return value

    return read


def _count(most: int = MOST) -> Callable[[str], int]:
    """A whole number that counts something: tokens, ranks, blocks."""

    def read(text: str) -> int:
        if not (text.isdecimal() and len(text) <= len(str(most)) and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}")
        return int(text)

    return read


def _drawing(text: str) -> Path:
    if Path(text).suffix not in _DRAWINGS:
        raise argparse.ArgumentTypeError(f"must end with {', '.join(_DRAWINGS)}")
    return Path(text)


def _scale(text: str) -> list[int]:
    """Sizes from the first to the last, each twice the one before."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= 10**6):
        raise argparse.ArgumentTypeError("must be FROM:TO, two numbers of GPUs such as 8:4096, a million at most")
    sizes = [int(first)]
    while 2 * sizes[-1] <= int(last):
        sizes.append(2 * sizes[-1])
    return sizes
