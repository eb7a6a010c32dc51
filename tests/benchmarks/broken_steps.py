"""Steps that end in every way in which a step can end. Imports no torch: their processes start at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting


def done(notes: Notes, setting: Setting) -> None:
    notes.number("answer", 42)
    notes.row("Answers", question="life | and *all*", answer=os.environ.get("ANSWER", "none"))


def raises(notes: Notes, setting: Setting) -> None:
    notes.number("half", 1)
    raise ValueError("the second half is missing")


def cuda_error(notes: Notes, setting: Setting) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hangs(notes: Notes, setting: Setting) -> None:
    """Together with a process that it has started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    notes.number("child", child.pid)
    print("waiting for a kernel that never ends", flush=True)
    time.sleep(60)


def is_killed(notes: Notes, setting: Setting) -> None:
    print("```` is no end of a code block", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
