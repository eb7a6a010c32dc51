"""Keeps a job running when its log or its monitors cannot be written: a full disk must not end a training run."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from deepspeed.monitor.monitor import Monitor

from scmoe_ds.parallel.agreement import is_rank_zero

_PROBE_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
logger = logging.getLogger("scmoe_ds")


class SteadyStream:
    """A text stream that drops text that cannot be written, and raises no OSError.

    Args:
        stream: `sys.stdout` or `sys.stderr`.
        name: for the message.
        other: a stream for a message about the first failure.
    """

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._failed and not isinstance(error, BrokenPipeError):  # nobody reads it any more
                self._failed = True
                with suppress(OSError):
                    self._other.write(
                        f"{self._name} cannot be written: {error.strerror or error}. The job goes on; "
                        "its lines are lost as long as this lasts\n"
                    )
                    self._other.flush()


class _DefaultHandler(logging.StreamHandler[TextIO]):
    """Writes to stdout, as DeepSpeed's logger does, as long as nobody else has set up a handler."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers and logger.handlers == [self]:
            self.stream = sys.stdout  # which a program may have replaced since
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"[scmoe_ds] {level}{super().format(record)}"


def log(*lines: str, level: int = logging.INFO) -> None:
    """Writes lines to the package's log, on rank 0."""
    show_by_default()
    for line in lines if is_rank_zero() else ():
        logger.log(level, "%s", line)


def show_by_default() -> None:
    """Shows the package's log to a user who has set up no logging. Handlers and levels of a user's own decide alone."""
    if logger.hasHandlers():
        return
    logger.addHandler(_DefaultHandler(sys.stdout))
    if logger.level == logging.NOTSET and logging.root.level == logging.WARNING:  # both as Python sets them
        logger.setLevel(logging.INFO)


def show_log(stream: TextIO) -> None:
    """Shows the package's log in a program of this package: plain lines."""
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(stream)]


@contextmanager
def steady_output(stdout: bool = True) -> Iterator[None]:
    """Inside the block, nothing that writes to stdout or stderr fails: print, logging, tracebacks, other packages.

    Args:
        stdout: guard stdout too. False when it is a program's result, whose loss is an error.
    """
    # A process that was started with a closed descriptor has None as stream.
    before = tuple(stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    reports = logging.raiseExceptions
    logging.raiseExceptions = False  # a handler would write a traceback about each lost line
    sys.stdout = SteadyStream(before[0], "stdout", before[1]) if stdout else before[0]
    sys.stderr = SteadyStream(before[1], "stderr", before[0])
    try:
        yield
    finally:
        logging.raiseExceptions = reports
        sys.stdout, sys.stderr = before
        for stream in before if stdout else before[1:]:
            try:
                stream.flush()
            except OSError:  # at exit the interpreter would try to write the buffer, fail, and end with code 120
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def without_full_disks(whole: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON without the monitors whose disk is already full, because they could not start. For rank 0.

    When a directory cannot be written for another reason, its monitor stays on: the user can correct that.
    """
    kept = dict(whole)
    for name in ("tensorboard", "csv_monitor"):
        section = whole.get(name)
        if not isinstance(section, Mapping) or not section.get("enabled"):
            continue
        directory = os.path.join(section.get("output_path") or "", section.get("job_name") or "")
        try:
            os.makedirs(directory or ".", exist_ok=True)
            with tempfile.TemporaryFile(dir=directory or ".") as probe:
                probe.write(bytes(_PROBE_BYTES))
        except OSError as error:
            if error.errno in _FULL:
                logger.warning(f"{name}: {directory} cannot be written: {error.strerror}. The job goes on without it")
                kept[name] = {**section, "enabled": False}
    return kept


def steady_monitors(master: Any) -> None:
    """Makes DeepSpeed's monitors (TensorBoard, CSV, …) log once that they cannot write, instead of raising.

    Args:
        master: `engine.monitor`, to which the engine itself writes in every step.
    """
    for monitor in list(vars(master).values()):
        if isinstance(monitor, Monitor):
            monitor.write_events = _guarded(monitor)


def _guarded(monitor: Monitor) -> Callable[..., None]:
    write, failed = monitor.write_events, False

    def attempt(*args: Any, **kwargs: Any) -> None:
        nonlocal failed
        try:
            write(*args, **kwargs)
        except Exception as error:  # a full disk or a service that is down is no reason to stop
            if not failed:
                failed = True
                what = f"{type(monitor).__name__} cannot write: {error}"
                logger.warning(f"{what}. The job goes on; its values may be missing from here on")

    return attempt
