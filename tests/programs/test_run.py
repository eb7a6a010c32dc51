"""What every program does around its job."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import pytest

from scmoe_ds.errors import UserError
from scmoe_ds.programs import run as program


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
        def __init__(self, name: str) -> None:
            pass

        def end(self, error: BaseException) -> None:
            raise Ended(error)

    monkeypatch.setattr(program, "connect", lambda timeout: True)
    monkeypatch.setattr(program, "FailureReporter", Reporter)
    monkeypatch.setattr(program.dist, "get_world_size", lambda: 2)
    watch: Any = None
    with pytest.raises(Ended, match="3"):
        program._run("a program", lambda: sys.exit(3), timedelta(1), watch)
