"""Flags of scmoe check: those of a training, of text or of images, and where it would run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scmoe_ds.errors import ArgumentError
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.models.swin_settings import SWIN_PRESETS
from scmoe_ds.programs.flags import gpt, swin
from scmoe_ds.programs.flags.checks import check_ranges, require_flags
from scmoe_ds.programs.flags.parser import FlagParser, started_as
from scmoe_ds.programs.flags.training import parse_flags

if TYPE_CHECKING:  # torch and DeepSpeed take seconds, and the parser needs neither
    from scmoe_ds.config.loading import LoadedConfig

OFTEN = """
    --deepspeed_config --preset --world-size --gpus-per-node --card --rank --json --vocab-size --num-layers
    --hidden-size --num-attention-heads --seq-length --num-experts --topk --mlp-type --moe-expert-parallel-size
    --tensor-model-parallel-size --recompute-granularity
    """.split()
_OF_IMAGES = re.compile(r"--(img-size|window-size|embed-dim|depths|num-heads|num-classes|patch-dim|dataset)(=|$)")
_MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
_VOCABULARIES = {name: 32000 if name == "llama2-moe" else 50257 for name in PRESETS}
"""Of the tokenizers that the presets were trained with: GPT-2's and LLaMA-2's."""
_FILE_NAME = re.compile(r"_(\d+)x([A-Z]\w*)\.json$")


class _CheckParser(FlagParser):
    """The flags of a GPT's training; a command line of images goes to `images`."""

    images: FlagParser

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        return self.images.parse_args(args, namespace) if is_of_images(args) else super().parse_args(args, namespace)


def is_of_images(args: Sequence[str]) -> bool:
    """Whether a command line is that of scmoe pretrain-swin."""
    words = [word for arg in args for word in arg.split("=", 1)]
    presets = {value for flag, value in pairwise(words) if flag == "--preset"}
    return bool(presets & SWIN_PRESETS.keys()) or any(map(_OF_IMAGES.match, args))


def build_parser() -> _CheckParser:
    """The parser of a training's flags, of text or images, under this program's name."""
    parser: Any = gpt.build_parser()
    parser.__class__, parser.images = _CheckParser, swin.build_parser()
    for each in (parser, parser.images):
        _add_place(each)
    return cast(_CheckParser, parser)


def _add_place(parser: FlagParser) -> None:
    parser.prog = started_as("scmoe check")
    parser.description = (
        "Would this training run, and fit? Runs one step of it without a GPU, on tensors that have shapes and a device "
        "but no values: wrong shapes, mixed devices, host reads and refused options end there. Prints memory, bytes "
        "sent, FLOPs and the least time of a step. Takes the flags of a training, of text or of images."
    )
    parser.example = (
        "scmoe check --preset gpt2-moe-medium \\\n"
        "      --deepspeed_config ds_configs/gpt2_moe_medium_16xA800.json --world-size 16"
    )
    parser.epilog, parser.often = "docs/check.md says what is checked, and what is not.", OFTEN
    group = parser.add_argument_group("where it would run")
    group.add_argument(
        "--world-size", type=int, help="GPUs of all nodes; default: of a file name as ..._16xA800.json, or 1"
    )
    group.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each node")
    group.add_argument("--card", help="kind of GPU; default: of a file name as ..._16xA800.json, or A800")
    group.add_argument("--rank", type=int, default=0, help="the rank that is looked at")
    group.add_argument("--json", metavar="FILE", help="write all numbers there, for programs")
    group.add_argument("--vocab-size", type=int, help="of a tokenizer whose files are not here; default: the preset's")


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, LoadedConfig, bool]:
    """Flags, the DeepSpeed JSON with the flags merged into it, and whether images are trained on.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can correct.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    from scmoe_ds.programs.flags.to_json import load_merged, merge_schedule, read_json, set_length

    argv = list(sys.argv[1:] if argv is None else argv)
    parser, images = build_parser(), is_of_images(argv)
    presets: dict[str, Any] = dict(SWIN_PRESETS) if images else {name: each.arguments for name, each in PRESETS.items()}
    args = parse_flags(parser.images if images else parser, presets, argv)
    whole = {key: value for key, value in read_json(args).items() if key not in _MONITORS}
    set_length(args, whole)
    args.train_iters = args.train_iters or 1000  # of a step any length is good
    if images:
        require_flags(args, swin.SIZES)
        check_ranges(args)
    else:
        if args.vocab_size is None and not (args.tokenizer_type or args.tokenizer_model):
            args.vocab_size = _VOCABULARIES.get(args.preset)
        gpt.check_shape(args)
    _set_place(args)
    config = load_merged(args, merge_schedule(whole, args))
    if not images:
        config.section.check_model(args.num_layers)
    return args, config, images


def _set_place(args: argparse.Namespace) -> None:
    named = _FILE_NAME.search(Path(args.deepspeed_config).name)
    args.world_size = args.world_size if args.world_size is not None else int(named[1]) if named else 1
    args.card = args.card or (named[2] if named else "A800")
    for name in ("world_size", "gpus_per_node"):
        if getattr(args, name) < 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not 0 <= args.rank < args.world_size:
        raise ArgumentError(
            f"--rank {args.rank}: must be in 0 … {args.world_size - 1} (--world-size {args.world_size})"
        )
