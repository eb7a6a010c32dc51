"""The newcomer's terminal: in the short form this process, in the long form a new environment.

The long form (`SCMOE_NEWCOMER=long`) makes a virtual environment, installs the package into it as README says, and runs
every command there as a process of its own. It needs a package index and minutes, so CI runs the short form.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import programs
from tests.helpers import shell

ROOT = Path(__file__).parents[2]
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
IS_LONG = os.environ.get("SCMOE_NEWCOMER") == "long"


@dataclass
class Terminal:
    """Runs command lines in a directory.

    Attributes:
        home: the directory.
        bin: of the new environment; None: this process runs the commands.
    """

    home: Path
    bin: Path | None
    capture: pytest.CaptureFixture[str] | None = None

    def do(self, line: str) -> str:
        """Runs a command line that has to succeed; returns what it printed."""
        code, text = self._in_this_process(line) if self.bin is None else self._as_a_process(line)
        assert code == 0, f"{line}\nexit code {code}\n{text[-3000:]}"
        return text

    def do_on_two_ranks(self, module: str, line: str) -> None:
        """Runs a module under the launcher; in the short form in forked processes without it."""
        if self.bin is not None:
            self.do(f"deepspeed --num_accelerators 2 --module {module} {line}")
        else:
            done = programs.run(["-m", module, *shlex.split(line)], 2, self.home)
            assert done.returncode == 0, done.stderr[-3000:]

    def start(self, line: str) -> subprocess.Popen[str]:
        """Starts a command line as a process, in both forms."""
        _, words = shell.split(line)
        word = shutil.which(words[0], path=self._environment()["PATH"])
        assert word is not None
        return subprocess.Popen([word, *words[1:]], cwd=self.home, env=self._environment(), text=True)

    def _in_this_process(self, line: str) -> tuple[int, str]:
        assert self.capture is not None
        self.capture.readouterr()
        _, words = shell.split(line)
        code = shell.run(words)
        said = self.capture.readouterr()
        return code, said.out + said.err

    def _as_a_process(self, line: str) -> tuple[int, str]:
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.home,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def _environment(self) -> dict[str, str]:
        if self.bin is None:  # without what says that this process is a rank
            return {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        kept = {
            name: value for name, value in os.environ.items() if name.startswith(("HOME", "PIP_", "TMP", "OMP_", "DS_"))
        }
        return {**kept, "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin"}


def install(home: Path) -> Path:
    """README's `pip install`, in an empty environment; returns its directory of programs."""
    venv.create(home / "env", with_pip=True)
    python = home / "env/bin/python"
    package = f"{ROOT}[hf,plots,images]"
    subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True, stdout=sys.stderr)
    return python.parent
