"""Writes the model weights of a checkpoint of pretrain_gpt_scmoe.py as safetensors. --load starts a run with them.

scmoe convert export checkpoints/run out --dtype bf16
scmoe convert export checkpoints/run hf_model --format hf   # AutoModelForCausalLM.from_pretrained("hf_model", …)
scmoe convert partition checkpoints/run parts --parts 2 --method partial   # experts in parts (sparse/partition.py)

export --format hf takes DeepSpeed's checkpoints of Hugging Face models with AutoEP layers, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scmoe_ds.checkpoint.autoep.trained import is_of_autoep
from scmoe_ds.checkpoint.directories import locate
from scmoe_ds.checkpoint.export import export
from scmoe_ds.checkpoint.parsing import DTYPES
from scmoe_ds.errors import CheckpointError
from scmoe_ds.programs.alone import run_alone
from scmoe_ds.programs.flags.checks import check_ranges
from scmoe_ds.programs.flags.convert import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Converts; returns the exit code."""
    args = build_parser().parse_args(argv)
    return run_alone("scmoe convert", lambda: _convert(args), argv)


def _convert(args: argparse.Namespace) -> None:
    check_ranges(args)
    if args.command == "partition":
        _partition(args)
        return
    size = int(args.shard_gb * 10**9)
    dtype = DTYPES[args.dtype or "fp32"]
    if is_of_autoep(args.source):
        _export_hugging_face(args, size)
        return
    if args.model is not None:
        raise CheckpointError(
            f"--model {args.model}: is for a checkpoint of a Hugging Face model with AutoEP layers, and "
            f"{args.source} is not one; remove it"
        )
    shards = export(args.source, args.out, dtype, size, args.format == "hf")
    source = locate(args.source)
    print(f"wrote {args.out} of {source} ({shards} file(s) of weights); start a run with them: --load {args.out}")


def _partition(args: argparse.Namespace) -> None:
    from scmoe_ds.checkpoint.adapted.source import is_hugging_face
    from scmoe_ds.sparse.hugging_face import partition_hugging_face
    from scmoe_ds.sparse.own_models import partition_own

    if is_hugging_face(args.source):
        files = partition_hugging_face(args.source, args.out, args.parts, args.method)
    elif is_of_autoep(args.source):
        raise CheckpointError(
            f"{args.source}: is of a Hugging Face model with AutoEP layers; write it by scmoe convert export --format "
            "hf, and partition that"
        )
    else:
        files = partition_own(args.source, args.out, args.parts, args.method)
    print(f"wrote {args.out} ({files} file(s) of weights): each expert in {args.parts} parts, {args.method} partition")


def _export_hugging_face(args: argparse.Namespace, size: int) -> None:
    from scmoe_ds.checkpoint.autoep.export import export_hugging_face

    if args.format != "hf":
        raise CheckpointError(
            f"{args.source}: is of a Hugging Face model with AutoEP layers; scmoe convert export --format hf writes it"
        )
    dtype = DTYPES[args.dtype] if args.dtype else None
    shards = export_hugging_face(args.source, args.out, dtype, size, args.model)
    print(
        f"wrote {args.out} of {args.source} ({shards} file(s) of weights); "
        f'AutoModelForCausalLM.from_pretrained("{args.out}") loads them'
    )


if __name__ == "__main__":
    sys.exit(main())
