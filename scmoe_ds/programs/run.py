"""What every program of this package does around its job: log, arguments, process group, errors in one sentence."""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from scmoe_ds import checkpoint
from scmoe_ds.parallel.error_text import mistake_of
from scmoe_ds.parallel.failures import FailureReporter, leave
from scmoe_ds.parallel.output import show_log, steady_output
from scmoe_ds.parallel.process import connect, device, end_rank, prepare_environment
from scmoe_ds.parallel.stalls import StallWatch
from scmoe_ds.parallel.watch import Watch
from scmoe_ds.programs import debug_is_asked
from scmoe_ds.programs.alone import tell
from scmoe_ds.programs.quiet import filter_prints_and_warnings

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell's."""

Job = Callable[..., object]
Parse = Callable[[Sequence[str] | None], tuple[Any, ...]]


def run_program(
    name: str,
    argv: Sequence[str] | None,
    job: Job,
    parse: Parse,
    stdout_is_log: bool = False,
) -> int:
    """Runs a job in a process group; returns the exit code. A user's mistake ends in one sentence, without a traceback.

    Args:
        name: for the error message.
        argv: flags; default: the command line's.
        job: gets what `parse` returns.
        parse: reads the flags.
        stdout_is_log: the job prints a log, not a result, and goes on when it cannot be written.
    """
    if not faulthandler.is_enabled():
        # A file that is mapped into memory and becomes shorter ends a process by SIGBUS: the stack says which is read.
        faulthandler.enable(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path or a text that the terminal cannot show is no reason to end
            with suppress(OSError):  # a descriptor that is closed
                stream.reconfigure(errors="backslashreplace")
    debug = debug_is_asked(argv)
    with steady_output(stdout=stdout_is_log):
        show_log(sys.stdout if stdout_is_log else sys.stderr)
        if not debug:
            filter_prints_and_warnings()
        try:
            parsed = parse(argv)
            if not dist.is_initialized():
                prepare_environment()
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            # Before the ranks have met, each node speaks for itself.
            return tell(name, error, debug, speaks=os.environ.get("LOCAL_RANK", "0") == "0")
        timeout = timedelta(minutes=getattr(parsed[0], "distributed_timeout_minutes", 10.0))
        with Watch(name, timeout.total_seconds()) as watch:
            return _run(name, lambda: job(*parsed), timeout, watch, debug)


def _run(name: str, job: Callable[[], object], timeout: timedelta, watch: Watch, debug: bool) -> int:
    reporter: FailureReporter | None = None
    connected, code = False, 0
    try:
        connected = connect(timeout)
        if connected and dist.get_world_size() > 1:
            reporter = FailureReporter(name, debug)
            if device().type == "cuda":
                StallWatch(timeout.total_seconds(), reporter.end).start()
        try:
            job()
        finally:
            checkpoint.release()  # every way out below may end the process at once
    except KeyboardInterrupt:
        if not connected:
            return INTERRUPTED
        if reporter is not None:
            reporter.note("interrupted")
        if dist.get_rank() == 0:
            print(f"{name}: interrupted", file=sys.stderr, flush=True)
        leave(INTERRUPTED)  # the others may be inside a collective
    except (Exception, SystemExit) as error:  # a library that calls sys.exit on one rank leaves the others, too
        if reporter is not None:
            _end_failed(name, error, reporter)
        if isinstance(error, SystemExit):
            raise
        code = tell(name, error, debug, speaks=os.environ.get("RANK" if connected else "LOCAL_RANK", "0") == "0")
    watch.done()
    if reporter is not None:
        end_rank(code)
    if connected:
        dist.destroy_process_group()
    return code


def _end_failed(name: str, error: Exception | SystemExit, reporter: FailureReporter) -> NoReturn:
    """Ends this rank. If it failed alone, it leaves others inside a collective."""
    mistake = mistake_of(error)
    if mistake is None:
        reporter.end(error)
    if reporter.speaks(mistake.alike, code=2):
        tell(name, error, reporter.debug)
    leave(2)
