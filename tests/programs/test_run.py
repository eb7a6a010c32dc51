"""What every program does around its job."""

from __future__ import annotations

import os
import re
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch

from scmoe_ds.errors import UserError
from scmoe_ds.parallel.failures import at_iteration
from scmoe_ds.programs import run as program
from scmoe_ds.programs.alone import run_alone


def test_a_stream_that_is_closed_before_a_program_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        stream = open(descriptor, "w", closefd=False)  # noqa: SIM115
        stream.write("something that is still to be written")
        os.close(descriptor)
        monkeypatch.setattr(sys, name, stream)

    def parse(argv: object) -> tuple[object, ...]:
        raise UserError("a flag")

    assert program.run_program("a program", [], print, parse) == 2


def test_one_rank_that_calls_sys_exit_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may: the other ranks would wait for it in a collective, and know of no cause."""

    class Ended(BaseException):
        pass

    class Reporter:
        def __init__(self, name: str, debug: bool) -> None:
            pass

        def end(self, error: BaseException) -> None:
            raise Ended(error)

    monkeypatch.setattr(program, "connect", lambda timeout: True)
    monkeypatch.setattr(program, "FailureReporter", Reporter)
    monkeypatch.setattr(program.dist, "get_world_size", lambda: 2)
    watch: Any = None
    with pytest.raises(Ended, match="3"):
        program._run("a program", lambda: sys.exit(3), timedelta(1), watch, False)


OF_CPP = """not so
Exception raised from doWait at /pytorch/TCPStore.cpp:587 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7f in libc10.so)
<omitting python frames>
frame #44: <unknown function> + 0x2724a (0x7f in libc.so.6)
"""


@pytest.mark.parametrize(
    ("error", "code", "stack", "message"),
    [
        (UserError("x = 1: a rule; a remedy"), 2, False, "x = 1: a rule; a remedy"),
        (KeyError("lost"), 1, True, r"KeyError: 'lost' \(see the traceback above\)"),
        (RuntimeError(OF_CPP), 1, True, r"RuntimeError: not so \(see the traceback above\)"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, False, "/a/b: Permission denied; correct the path"),
        (OSError(28, "No space left on device"), 2, False, "No space left on device; .*make room"),
        (ConnectionResetError(104, "Connection reset"), 1, True, r"ConnectionResetError: \[Errno 104\]"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            2,
            False,
            r"iteration 7: out of memory \(CUDA out .*lower",
        ),
        (MemoryError(), 2, False, r"out of memory \(of the host\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_mistake_is_one_sentence_and_a_fault_has_its_traceback(
    error: Exception, code: int, stack: bool, message: str, debug: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if "out of memory" in str(error):
        at_iteration(error, 7)

    def fail() -> None:
        raise error

    assert run_alone("scmoe x", fail, ["--debug"] if debug else []) == code
    said = capfd.readouterr().err
    assert re.match(rf"scmoe x: error: {message}", said.splitlines()[-1])
    assert ("Traceback" in said) == (stack or debug)
    assert ("frame #0" in said) == (debug and "frame #0" in str(error))
    assert "Exception raised from" not in said or debug


def test_memory_that_the_host_does_not_have(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_alone("scmoe x", lambda: torch.empty(1 << 52), []) == 2
    assert re.fullmatch(r"scmoe x: error: out of memory \(.*allocate.*\): lower .*\n", capfd.readouterr().err)
