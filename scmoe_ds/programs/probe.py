"""What does this machine compute and send? Measures it in about a minute, for `scmoe plan`.

scmoe probe --output profile.json                                             # one process, no collectives
deepspeed --hostfile hosts --module scmoe_ds.programs.probe --output profile.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deepspeed import get_accelerator

from scmoe_ds.data.durable_files import try_to_write, write_whole
from scmoe_ds.errors import ArgumentError
from scmoe_ds.parallel.agreement import is_rank_zero, run_on_rank_zero
from scmoe_ds.parallel.process import device
from scmoe_ds.probe.measure import measure
from scmoe_ds.probe.text import table
from scmoe_ds.programs.flags.checks import require_same_flags
from scmoe_ds.programs.flags.probe import parse_arguments
from scmoe_ds.programs.run import run_program
from scmoe_ds.simulate.gpu import PeakOf


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    return run_program("scmoe probe", argv, probe, parse_arguments)


def probe(args: argparse.Namespace) -> None:
    """Measures this world of ranks. Rank 0 prints and writes."""
    require_same_flags(args)
    run_on_rank_zero(lambda: try_to_write(args.output.parent))  # before a minute is spent
    profile = measure(args.seconds, precisions(args.precision))
    run_on_rank_zero(lambda: write_whole(args.output, profile.model_dump_json(indent=1) + "\n"))
    if is_rank_zero():
        print(*table(profile, args.details), f"written to {args.output}", sep="\n")
        sys.stdout.flush()


def precisions(named: Sequence[PeakOf] | None) -> list[PeakOf]:
    """Those that are measured.

    Raises:
        ArgumentError: one that this device does not have.
    """
    accelerator = get_accelerator()
    has: dict[PeakOf, bool] = {
        "fp32": True,
        "bf16": accelerator.is_bf16_supported(),
        "fp16": accelerator.is_fp16_supported(),
    }
    for each in named or ():
        if not has[each]:
            found = ", ".join(name for name in has if has[name])
            raise ArgumentError(f"--precision {each}: this device computes in {found}; give one of them")
    return list(named or (name for name in has if has[name] and (name == "fp32" or device().type == "cuda")))


if __name__ == "__main__":
    sys.exit(main())
