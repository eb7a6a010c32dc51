"""Locks of DeepSpeed's compilations: whose owner is dead is removed, whose owner lives is not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scmoe_ds.parallel import compilation


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "lock").touch()
    return tmp_path / "lock"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock as torch's FileBaton does."""
    program = (
        "import sys; from torch.utils.file_baton import FileBaton; "
        "print(FileBaton(sys.argv[1]).try_acquire(), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_an_interrupted_compilation_is_forgotten(
    tmp_path: Path, owner: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "lock"
    compilation.wait_for_lock(tmp_path)
    assert lock.exists(), "its owner lives"
    owner.kill()
    owner.wait()
    caplog.set_level(logging.WARNING, "scmoe_ds")
    name = compilation.wait_for_lock(tmp_path)
    assert not lock.exists() and name.exists()
    assert f"removed {lock}" in caplog.text


def test_another_host_may_own_it(lock: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "scmoe_ds")
    (tmp_path / "compiler-elsewhere_1-42").touch()
    waiting = threading.Thread(target=compilation.wait_for_lock, args=(tmp_path, 0.02))
    waiting.start()
    deadline = time.monotonic() + 30
    while "remove the file" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert waiting.is_alive() and lock.exists() and str(lock) in caplog.text
    lock.unlink()  # the remedy, or the end of the compilation
    waiting.join(20)
    assert not waiting.is_alive()


def test_another_host_that_is_quiet_is_dead(lock: Path, tmp_path: Path) -> None:
    (tmp_path / "compiler-elsewhere_1-42").touch()
    long_ago = time.time() - 2 * compilation._QUIET_S
    os.utime(lock, (long_ago, long_ago))
    compilation.wait_for_lock(tmp_path)
    assert not lock.exists()


def test_a_compilation_is_announced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from deepspeed.ops.op_builder.builder import OpBuilder

    seen: list[list[str]] = []
    monkeypatch.setattr(OpBuilder, "jit_load", lambda self: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    monkeypatch.setattr(compilation, "build_directory", lambda name: tmp_path)
    compilation.announce()
    caplog.set_level(logging.WARNING, "scmoe_ds")

    class Builder(OpBuilder):
        def __init__(self) -> None:
            self.name = "some_op"

        def absolute_name(self) -> str:
            return ""

        def sources(self) -> list[str]:
            return []

    (tmp_path / "lock").touch()
    Builder().jit_load()
    assert "compiles some_op for this machine, once: about a minute" in caplog.text
    assert len(seen[0]) == 1 and seen[0][0].startswith("compiler-"), "no lock, and a name for other hosts"
    (tmp_path / "some_op.so").touch()
    caplog.clear()
    Builder().jit_load()
    assert caplog.text == "" and [path.name for path in tmp_path.iterdir()] == ["some_op.so"]
