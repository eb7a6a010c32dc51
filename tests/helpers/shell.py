"""Runs a command line as a shell would, but in this process and on one rank: no start of a process, no launcher."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """Variables of the environment and words of a command line; the program without its directory."""
    words = shlex.split(line)
    count = next(i for i, word in enumerate(words) if not re.fullmatch(r"[A-Z_]+=.*", word))
    variables = dict(word.split("=", 1) for word in words[:count])
    return variables, [Path(words[count]).name, *words[count + 1 :]]


def started(words: list[str]) -> tuple[Any, str, list[str]]:
    """What a command line starts: the launcher's arguments (None without `deepspeed`), module or script, its flags."""
    program, *rest = words
    if program == "scmoe":
        from scmoe_ds.programs.__main__ import PROGRAMS

        if rest and rest[0] in PROGRAMS:
            return None, f"scmoe_ds.programs.{PROGRAMS[rest[0]][0]}", rest[1:]
        return None, "scmoe_ds.programs.__main__", rest
    if program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launcher = parse_args(rest)
        script = launcher.user_script
        if script == "pretrain_gpt_scmoe.py":
            script = "scmoe_ds.programs.pretrain_gpt"
        return launcher, script, launcher.user_args
    assert program in ("python", "python3"), f"{program} cannot be run here"
    return (None, rest[1], rest[2:]) if rest[0] == "-m" else (None, rest[0], rest[1:])


def run(words: list[str]) -> int:
    """Runs a program's `main`, or a script; returns its exit code."""
    _, program, flags = started(words)
    with _arguments([program, *flags]):
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
                return 0
            code: int = importlib.import_module(program).main(flags)
            return code
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ):
        yield
