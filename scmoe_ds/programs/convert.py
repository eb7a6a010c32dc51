"""Writes the model weights of a checkpoint of pretrain_gpt_scmoe.py as safetensors. --load starts a run with them.

scmoe convert export checkpoints/run out --dtype bf16
scmoe convert residual-to-scmoe checkpoints/residual_moe out --position pos2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from scmoe_ds.checkpoint.directories import locate
from scmoe_ds.checkpoint.export import export, residual_to_scmoe
from scmoe_ds.errors import CheckpointError
from scmoe_ds.programs.flags.parser import FlagParser
from scmoe_ds.programs.run import run_alone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(prog="scmoe convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {
        "export": "whole parameters, merged over expert- and tensor-parallel ranks",
        "residual-to-scmoe": 'a model of architecture "shared_expert" as a ScMoE with merge "cg2"',
    }
    for name, text in add.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("source", type=Path, help="a checkpoint, a directory of them (the latest), or an export")
        command.add_argument("out", type=Path, help="an empty or new directory")
        command.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="fp32 loses nothing (default)")
        command.add_argument("--shard-gb", type=float, default=5.0, help="size of a file, in 10^9 bytes (default: 5)")
    command.add_argument(
        "--position", choices=["pos1", "pos2", "pos3"], default="pos2", help="position of the shortcut"
    )
    command.add_argument(
        "--first-layer-position", choices=["pos1", "pos2", "pos3"], help="position of the first MoE layer's shortcut"
    )
    command.add_argument(
        "--shortcut-norm", choices=["own", "shared"], default="own", help="own: starts as a copy of the backbone's"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_alone("scmoe convert", lambda: _convert(args))


def _convert(args: argparse.Namespace) -> None:
    if args.shard_gb <= 0:
        raise CheckpointError(f"--shard-gb {args.shard_gb}: must be above 0")
    size = int(args.shard_gb * 10**9)
    if args.command == "export":
        shards = export(args.source, args.out, DTYPES[args.dtype], size)
    else:
        names = ("position", "first_layer_position", "shortcut_norm")
        changes = {name: getattr(args, name) for name in names}
        shards = residual_to_scmoe(args.source, args.out, changes, DTYPES[args.dtype], size)
    source = locate(args.source)
    print(f"wrote {args.out} of {source} ({shards} file(s) of weights); start a run with them: --load {args.out}")


if __name__ == "__main__":
    sys.exit(main())
