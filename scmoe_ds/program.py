"""What every program of this package does around its job: log, arguments, process group, errors in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from scmoe_ds.arguments import parse_arguments
from scmoe_ds.config import ScMoEConfig
from scmoe_ds.engine import connect, show_log

Job = Callable[[argparse.Namespace, dict[str, Any], ScMoEConfig], object]


def run_program(name: str, argv: Sequence[str] | None, job: Job, errors: tuple[type[Exception], ...]) -> int:
    """Runs a job in a process group; returns the exit code.

    Args:
        name: for the error message.
        argv: flags of pretrain_gpt_scmoe.py; default: the command line's.
        job: gets the flags, the DeepSpeed JSON and its "scmoe" section.
        errors: what a user can mend; it ends in one sentence, not in a traceback.
    """
    show_log()
    connected, code = False, 0
    try:
        args, whole, config = parse_arguments(argv)
        connected = connect()
        job(args, whole, config)
    except errors as error:
        # Before the ranks have met, each node speaks for itself; afterwards all of them fail alike.
        if os.environ.get("RANK" if connected else "LOCAL_RANK", "0") == "0":
            print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        code = 2
    # Not in a finally: after any other error the traceback matters, and other ranks may be inside a collective.
    if connected:
        dist.destroy_process_group()
    return code
