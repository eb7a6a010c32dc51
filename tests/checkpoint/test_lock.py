"""One job per --save directory. Other jobs are forked processes; other hosts and file systems without locks are played."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import lock
from scmoe_ds.errors import CheckpointError
from tests.programs.test_bad_input import data as data
from tests.programs.test_bad_input import expect_refusal, run
from tests.programs.test_bad_input import world_of_one as world_of_one


@contextmanager
def another_job(directory: Path, then: Callable[[], Any] = lambda: None) -> Iterator[int]:
    """A process that holds the lock until it is killed; its id."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        lock.hold(directory)
        then()
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def leaves_no_lock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock, "ENDING_S", 0.5)
    yield
    lock.release()


def hold(directory: Path) -> None:
    """As another start of a job does it."""
    lock.release()
    lock.hold(directory)


def content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / lock.LOCK_FILE).read_text())


def write(directory: Path, **changes: Any) -> None:
    (directory / lock.LOCK_FILE).write_text(json.dumps({**lock._identity(), **changes}))


def refused(pid: int, host: str | None = None) -> Any:
    who = rf"host {re.escape(host or socket.gethostname())}, process {pid}, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    return pytest.raises(CheckpointError, match=rf"--save .*: another job saves there \({who}; its lock is ")


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)


def test_the_second_job_is_refused_by_name_and_goes_on_once_the_first_is_killed(tmp_path: Path) -> None:
    with another_job(tmp_path) as pid:
        with refused(pid):
            hold(tmp_path)
        assert content(tmp_path)["pid"] == pid, "the refused one has left the lock alone"
        with refused(pid):
            hold(tmp_path / ".." / tmp_path.name)
        os.kill(pid, signal.SIGKILL)
        hold(tmp_path)  # at once: its launcher has not yet asked how it ended
        assert content(tmp_path)["pid"] == os.getpid()


def test_a_child_of_a_killed_job_does_not_keep_the_lock(tmp_path: Path) -> None:
    children, parent_end = os.pipe()

    def start_a_worker() -> None:
        if (worker := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        os.write(parent_end, str(worker).encode())

    with another_job(tmp_path, start_a_worker):
        worker = int(os.read(children, 20))
    try:
        hold(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(children)
        os.close(parent_end)


@pytest.mark.parametrize("has_locks", [True, False])
def test_what_is_left_of_a_job_of_this_host(has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_locks:
        without_locks(monkeypatch)
    alive = os.getppid()
    write(tmp_path, pid=alive, process_start=lock._start_of(alive))
    with refused(alive):
        hold(tmp_path)
    for stale in ({"pid": alive, "process_start": 1}, {"pid": 2**22 + 1}, {"pid": "x"}, {"pid": None}):
        write(tmp_path, **stale)
        hold(tmp_path)
        assert content(tmp_path)["pid"] == os.getpid(), stale
    for damaged in (b"", b"{", b"[]", b"\xff\x00", b"[" * 4000):
        lock.release()
        (tmp_path / lock.LOCK_FILE).write_bytes(damaged)
        hold(tmp_path)


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_job_of_another_host(
    has_locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not has_locks:
        without_locks(monkeypatch)
        monkeypatch.setattr(lock.time, "sleep", lambda seconds: threading.Event().wait(seconds))
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    write(tmp_path, pid=7, host="elsewhere", place="another boot")
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.2):
            os.utime(tmp_path / lock.LOCK_FILE)

    toucher = threading.Thread(target=touch)
    toucher.start()
    with refused(7, "elsewhere"):
        hold(tmp_path)
    ended.set()
    toucher.join()
    hold(tmp_path)
    assert "no sign of life from process 7 on host elsewhere for 1 s: its lock is taken over" in caplog.text


def test_a_holder_touches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_S", 0.05)
    hold(tmp_path)
    file, deadline = tmp_path / lock.LOCK_FILE, time.monotonic() + 10
    os.utime(file, (1, 1))
    while file.stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("act", ["overwritten", "removed", "replaced"])
def test_a_job_whose_lock_was_taken_does_not_save(act: str, tmp_path: Path) -> None:
    hold(tmp_path)
    lock.require(tmp_path)
    if act != "overwritten":
        (tmp_path / lock.LOCK_FILE).unlink()
    if act != "removed":
        write(tmp_path, pid=7)
    with pytest.raises(CheckpointError, match="another job saves there"):
        lock.require(tmp_path)
    lock.release()
    assert (tmp_path / lock.LOCK_FILE).exists() == (act != "removed"), "the lock of the other job stays"


def test_release_leaves_nothing_behind(tmp_path: Path) -> None:
    hold(tmp_path / "new")
    lock.release()
    assert not (tmp_path / "new").exists()
    hold(tmp_path / "used")
    (tmp_path / "used" / "latest").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["latest"]


def test_a_directory_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/saved: cannot write there \(Not a directory\)"):
        checkpoint.claim(tmp_path / "file" / "saved")
    (tmp_path / "saved" / "scmoe.lock").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"cannot write there \(scmoe\.lock: Is a directory\)"):
        checkpoint.claim(tmp_path / "saved")


def test_a_program(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    save = tmp_path / "saved"
    flags: dict[str, Any] = {"--save": str(save), "--auto-resume": None}
    with another_job(save) as pid:
        expect_refusal(tmp_path, data, {}, flags, rf"another job saves there \(host .*, process {pid}, started", capfd)
        os.kill(pid, signal.SIGKILL)
        assert run(tmp_path, data, {}, flags) == 0, "at once"
    assert sorted(path.name for path in save.iterdir()) == ["global_step1", "latest", "log.jsonl"]
    assert run(tmp_path, data, {}, {**flags, "--train-iters": "2"}) == 0
