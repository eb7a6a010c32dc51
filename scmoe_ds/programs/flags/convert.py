"""Flags of scmoe convert."""

from __future__ import annotations

from pathlib import Path

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
    add = {
        "export checkpoints/gpt weights": "whole parameters, merged over expert- and tensor-parallel ranks",
        "residual-to-scmoe checkpoints/residual_moe out": (
            'a model of architecture "shared_expert" as a ScMoE with merge "cg2"'
        ),
    }
    for example, text in add.items():
        name = example.split()[0]
        command = commands.add_parser(name, help=text, description=text, example=f"scmoe convert {example}")
        command.add_argument("source", type=Path, help="a checkpoint, a directory of them (the latest), or an export")
        command.add_argument("out", type=Path, help="an empty or new directory")
        command.add_argument(
            "--dtype",
            choices=["bf16", "fp16", "fp32"],
            help="fp32 loses nothing (default: fp32; of a Hugging Face model: as it was trained)",
        )
        command.add_argument("--shard-gb", type=float, default=5.0, help="size of a file, in 10^9 bytes")
    export = commands.choices["export"]
    export.add_argument(
        "--format",
        choices=["scmoe", "hf"],
        default="scmoe",
        help="hf: transformers loads it, too (AutoModelForCausalLM, trust_remote_code for models of this package)",
    )
    export.add_argument(
        "--model", type=Path, help="of a Hugging Face model: its own directory (default: as the checkpoint says)"
    )
    command.add_argument(
        "--position", choices=["pos1", "pos2", "pos3"], default="pos2", help="position of the shortcut"
    )
    command.add_argument(
        "--first-layer-position", choices=["pos1", "pos2", "pos3"], help="position of the first MoE layer's shortcut"
    )
    command.add_argument(
        "--shortcut-norm", choices=["own", "shared"], default="own", help="own: starts as a copy of the backbone's"
    )
    command.add_argument("--join", choices=["end", "late"], default="end", help="where the routed outputs are added")
    return parser
