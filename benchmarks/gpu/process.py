"""A step in a process of its own, with a time limit. What happens to it is an outcome, not an end of the run.

python -m benchmarks.gpu.process MODULE:FUNCTION NOTES.json SETTING LIMIT_S
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.notes import Notes

LAST_LINES = 40
STACKS_S = 2.0
"""So long before its limit a step prints the stacks of all its threads: where it hangs."""

_CUDA = re.compile(r"CUDA error|CUDA out of memory|CUDASanitizer|device-side assert|NCCL error|ncclUnhandled", re.I)
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        result: "done", or what happened instead.
        last_lines: the end of what it printed, if it is not done.
    """

    result: str
    seconds: float
    notes: Notes
    last_lines: tuple[str, ...] = ()


def run(
    function: str,
    setting: Mapping[str, Any],
    limit_s: float,
    directory: Path,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Runs a function in a process of its own and waits for it.

    Args:
        function: "module:name"; it takes `Notes` and a `Setting`.
        setting: the fields of the `Setting`.
        limit_s: the process and all that it has started are killed after so many seconds.
        directory: for the step's notes and output.
        environment: variables that it gets beside this process's.
    """
    name = function.replace(":", ".")
    notes, output = directory / f"{name}.json", directory / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu.process", function, str(notes), json.dumps(dict(setting))]
    command.append(str(limit_s))
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})}
    started = time.monotonic()
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also the ranks and servers that it has started
            process.wait()
    lines = tuple(output.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:])
    result = _result(code, limit_s, lines)
    return Outcome(result, time.monotonic() - started, Notes.read(notes), () if result == "done" else lines)


def _result(code: int | None, limit_s: float, lines: tuple[str, ...]) -> str:
    if code is None:
        return f"killed: it ran past its limit of {limit_s:.0f} s"
    if code == 0:
        return "done"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "CUDA error" if _CUDA.search("\n".join(lines)) else f"failed with exit code {code}"


def main() -> None:
    from benchmarks.gpu.setting import Setting

    function, notes, setting, limit_s = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(float(limit_s) - STACKS_S, 1.0), exit=False)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(Notes(Path(notes)), Setting(**json.loads(setting)))


if __name__ == "__main__":
    main()
