"""What a program without a process group does around its job: errors in one sentence. Imports no torch."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Sequence

from scmoe_ds.parallel.error_text import in_words, mistake_of, print_stack
from scmoe_ds.programs import debug_is_asked


def run_alone(name: str, job: Callable[[], object], argv: Sequence[str] | None = None) -> int:
    """Runs a job that needs no process group; returns the exit code. `name` and `argv` as for `run.run_program`."""
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # as in `run.run_program`
    try:
        job()
    except Exception as error:
        return tell(name, error, debug_is_asked(argv))
    return 0


def tell(name: str, error: Exception | SystemExit, debug: bool, speaks: bool = True) -> int:
    """Prints an error, and returns the exit code. Only a fault of the program has its traceback, unless asked for."""
    mistake = mistake_of(error)
    if speaks:
        if debug or mistake is None:
            print_stack(error, debug)
        told = mistake or f"{in_words(error)} (see the traceback above)"
        print(f"{name}: error: {told}", file=sys.stderr, flush=True)
    return 1 if mistake is None else 2
