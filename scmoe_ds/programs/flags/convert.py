"""Flags of scmoe convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scmoe_ds.programs.flags.parser import FlagParser


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="scmoe convert",
        description="Write the weights of a checkpoint as safetensors. --load starts a run with them.",
        example="scmoe convert export checkpoints/gpt weights",
        epilog="scmoe convert COMMAND --help lists its flags.",
    )
    commands = parser.add_subparsers(dest="command", required=True, title="commands")
    text = "whole parameters, merged over expert- and tensor-parallel ranks"
    example = "scmoe convert export checkpoints/gpt weights"
    export = commands.add_parser("export", help=text, description=text, example=example)
    export.add_argument("source", type=Path, help="a checkpoint, a directory of them (the latest), or an export")
    export.add_argument("out", type=Path, help="an empty or new directory")
    export.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="fp32 loses nothing (default: fp32; of a Hugging Face model: as it was trained)",
    )
    export.add_argument("--shard-gb", type=float, default=5.0, help="size of a file, in 10^9 bytes")
    export.add_argument(
        "--format",
        choices=["scmoe", "hf"],
        default="scmoe",
        help="hf: transformers loads it, too (AutoModelForCausalLM, trust_remote_code for models of this package)",
    )
    export.add_argument(
        "--model", type=Path, help="of a Hugging Face model: its own directory (default: as the checkpoint says)"
    )
    _add_partition(commands)
    return parser


def _add_partition(commands: Any) -> None:
    text = "experts in parts, which compute together what the experts computed"
    example = "scmoe convert partition weights parts --parts 2 --method partial"
    partition = commands.add_parser("partition", help=text, description=text, example=example)
    partition.add_argument("source", type=Path, help="a checkpoint or an export, or a Hugging Face model's directory")
    partition.add_argument("out", type=Path, help="an empty or new directory")
    partition.add_argument("--parts", type=int, default=2, help="of each expert; must divide its width")
    partition.add_argument(
        "--method",
        choices=["complete", "partial"],
        required=True,
        help="complete: an ordinary model of more experts. partial: the gate stays (expert_partition)",
    )
