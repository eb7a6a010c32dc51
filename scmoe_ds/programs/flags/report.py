"""Flags of scmoe report: those of a training, of which the ones that concern training alone have no effect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.models.presets import PRESETS
from scmoe_ds.programs.flags import gpt
from scmoe_ds.programs.flags.parser import started_as
from scmoe_ds.programs.flags.to_json import load_merged, read_json
from scmoe_ds.programs.flags.training import parse_flags

_OF_TRAINING_ALONE = ("scheduler", "tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
"""Keys of the JSON. The report takes no learning-rate schedule and writes to no monitor."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of a training's flags, under this program's name."""
    parser = gpt.build_parser()
    parser.prog = started_as("scmoe report")
    parser.description = (
        "Is a training faster with ScMoE on this machine, and why? Times whole steps on random tokens, beside steps "
        "without overlap and with DeepSpeed's own MoE layer. Keeps nothing. Takes the flags of a training command."
    )
    parser.add_argument("--details", action="store_true", help="also print all times and the cost of every slot")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, LoadedConfig]:
    """Flags, and the DeepSpeed JSON with the flags merged into it.

    Raises:
        ArgumentError, ScMoEConfigError: a setting that its user can correct.
        SystemExit: argparse's own findings (unknown flag, not a number), and --help.
    """
    args = parse_flags(build_parser(), {name: preset.arguments for name, preset in PRESETS.items()}, argv)
    whole = {key: value for key, value in read_json(args).items() if key not in _OF_TRAINING_ALONE}
    gpt.check_shape(args)
    config = load_merged(args, whole)
    config.section.check_model(args.num_layers)
    return args, config
