"""Makes a trained MoE model a ScMoE: the same weights, and routed experts that read a preceding layer.

scmoe adapt checkpoints/residual_moe --output scmoe --position pos2 --join late
scmoe adapt report checkpoints/student --teacher-run checkpoints/teacher --output-prefix report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scmoe_ds.checkpoint.export import residual_to_scmoe
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.programs.adapt_report import write_report
from scmoe_ds.programs.flags.adapt import build_parser
from scmoe_ds.programs.run import run_alone

FIELDS = ("position", "first_layer_position", "merge", "join", "top_k", "shortcut_norm")
"""Flags that are fields of the "scmoe" section, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Adapts; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.command == "report":
        return run_alone("scmoe adapt report", lambda: write_report(args), argv)
    return run_alone("scmoe adapt", lambda: _adapt(args), argv)


def _adapt(args: argparse.Namespace) -> None:
    if args.shard_gb <= 0:
        raise ArgumentError(f"--shard-gb {args.shard_gb}: must be above 0")
    changes = {name: value for name in FIELDS if (value := getattr(args, name)) is not None}
    dtype = DTYPES[args.dtype or "fp32"]
    shards = residual_to_scmoe(args.source, args.output, changes, dtype, int(args.shard_gb * 10**9))
    print(f"wrote {args.output} of {args.source} ({shards} file(s) of weights); train it: --load {args.output}")


if __name__ == "__main__":
    sys.exit(main())
