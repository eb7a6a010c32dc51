"""Flags of scmoe report: those of a training, of which the ones that concern training alone have no effect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scmoe_ds.models.presets import PRESETS
from scmoe_ds.programs.flags import gpt
from scmoe_ds.programs.flags.parser import FlagParser, started_as
from scmoe_ds.programs.flags.training import parse_flags

if TYPE_CHECKING:  # torch and DeepSpeed take seconds, and the parser needs neither
    from scmoe_ds.config.loading import LoadedConfig

OFTEN = """
    --details --deepspeed_config --preset --num-layers --hidden-size --num-attention-heads --seq-length --num-experts
    --topk --mlp-type --scmoe-position --moe-expert-parallel-size --tensor-model-parallel-size --tokenizer-model
    --vocab-file --merge-file --recompute-granularity
    """.split()
_OF_TRAINING_ALONE = ("scheduler", "tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
"""Keys of the JSON. The report takes no learning-rate schedule and writes to no monitor."""


def build_parser() -> FlagParser:
    """The parser of a training's flags, under this program's name."""
    parser = gpt.build_parser()
    parser.prog = started_as("scmoe report")
    parser.description = (
        "Is a step faster with ScMoE on this machine, and why? Times whole training steps on random tokens, beside "
        "the same without overlap and the same with DeepSpeed's own MoE layer. Keeps nothing. Takes the flags of a "
        "training; those that concern training alone have no effect."
    )
    parser.example = (
        "deepspeed --num_accelerators 2 --module scmoe_ds.programs.report \\\n"
        "      --deepspeed_config ds_configs/gpt_small_cpu.json --num-layers 4 --hidden-size 128 \\\n"
        "      --num-attention-heads 4 --seq-length 256"
    )
    parser.often = OFTEN
    parser.add_argument("--details", action="store_true", help="also print all times and the cost of every slot")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, LoadedConfig]:
    """Flags, and the DeepSpeed JSON with the flags merged into it.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can correct.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    from scmoe_ds.programs.flags.to_json import load_merged, read_json

    args = parse_flags(build_parser(), {name: preset.arguments for name, preset in PRESETS.items()}, argv)
    whole = {key: value for key, value in read_json(args).items() if key not in _OF_TRAINING_ALONE}
    gpt.check_shape(args)
    config = load_merged(args, whole)
    config.section.check_model(args.num_layers)
    return args, config
