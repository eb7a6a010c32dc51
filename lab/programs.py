"""Starts a program of this package on several ranks of this machine, without a launcher.

Each rank is forked from the server of `lab.distributed`, which has imported the packages already. A process that starts
anew spends seven seconds on imports, and a small training job one. Tests of launchers, and of nothing but a job, differ
in this: `tests/cluster` and `tests/distributed/test_pretrain.py` start some jobs with the launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from lab.distributed import environment_of_one, free_port, preload, rank_environment

TIMEOUT_S = 400.0
# multiprocessing reads the exit codes of all processes whenever it starts one, and two threads would read the same one.
_lock = threading.Lock()


@dataclass
class Rank:
    """A process of a job, and the files of what it prints."""

    process: BaseProcess
    stdout: Path
    stderr: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Exit code; negative: the signal that ended it."""
        ended = connection.wait([self.process.sentinel], timeout_s)
        assert ended, f"rank {self.pid} runs after {timeout_s} s:\n{self.stderr.read_text()}"
        with _lock:
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def wait_for(self, pattern: str, timeout_s: float = TIMEOUT_S) -> None:
        """Returns when stdout has a line that starts so; fails if the process ends or the time is over before."""
        deadline = time.monotonic() + timeout_s
        while not re.search(f"^{pattern}", self.stdout.read_text(), re.MULTILINE):
            ended = connection.wait([self.process.sentinel], 0.02)
            assert not ended and time.monotonic() < deadline, self.stdout.read_text() + self.stderr.read_text()


@contextmanager
def ranks_of(
    words: Sequence[str], ranks: int, directory: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[Rank]]:
    """A job that runs; what is left of it at the end of the block is killed.

    Args:
        words: of a command line behind `python`: a script and its flags, or `-m`, a module and its flags.
        directory: in which the program runs.
        environment: variables beside those of this process and of the rank.
    """
    preload()
    context, port = multiprocessing.get_context("forkserver"), free_port()
    with TemporaryDirectory() as logs:
        started = []
        for rank in range(ranks):
            variables = {**environment_of_one(), **(environment or {})}
            if ranks > 1:
                variables |= rank_environment(rank, ranks, port)
            files = [Path(logs) / f"{kind}{rank}" for kind in ("stdout", "stderr")]
            for file in files:
                file.touch()
            process = context.Process(target=_program, args=(list(words), str(directory), variables, files))
            with _lock:
                process.start()
            started.append(Rank(process, *files))
        try:
            yield started
        finally:
            for each in started:
                with _lock:
                    each.process.kill()
                each.wait()


def run(
    words: Sequence[str],
    ranks: int,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> CompletedProcess[str]:
    """A whole job: the exit code of the first rank that failed, and what all ranks have printed, rank by rank."""
    with ranks_of(words, ranks, directory, environment) as started:
        deadline = time.monotonic() + timeout_s
        codes = [each.wait(max(0.0, deadline - time.monotonic())) for each in started]
        texts = ["".join(getattr(each, kind).read_text() for each in started) for kind in ("stdout", "stderr")]
    return CompletedProcess(list(words), next(filter(None, codes), 0), *texts)


def _program(words: list[str], directory: str, environment: dict[str, str], files: Sequence[Path]) -> None:
    for descriptor, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    sys.path.insert(0, directory if is_module else str(Path(words[0]).parent))
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
