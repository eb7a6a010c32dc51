"""Guardians of plain processes: who is killed, who is told what. They run in threads; the ranks are `sleep`s."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.parallel.guardian import limits
from scmoe_ds.parallel.guardian.guardian import Guardian
from scmoe_ds.parallel.guardian.lines import Lines
from scmoe_ds.parallel.guardian.processes import Process

PATIENCE_S = 30.0


class Rank:
    """A process that does nothing, its guardian, and this end of their socket."""

    def __init__(self, rank: int, ranks: int, timeout: float, launchers: list[int]) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        mine, its = socket.socketpair()
        self.control, self.heard = Lines(mine), list[dict[str, Any]]()
        self.guardian = Guardian(its, rank, ranks, f"host{rank}", self.process.pid, launchers, timeout)
        self.thread = threading.Thread(target=self.guardian.run)
        self.thread.start()

    def hears(self, key: str) -> Any:
        """The next message with a key; meanwhile the rank gives signs of life."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.control.send({})
            self.heard += self.control.receive() or []
            for message in self.heard:
                if key in message:
                    self.heard.remove(message)
                    return message[key]
            time.sleep(0.02)
        raise AssertionError(f"no {key!r} in {self.heard}")

    def lives(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.control.send({})
            assert self.process.poll() is None
            time.sleep(0.02)


Start = Callable[..., Rank]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    ranks: list[Rank] = []
    for name, value in {"TICK_S": 0.02, "SILENT_S": 0.2, "GRACE_S": 0.5, "LINGER_S": 2.0}.items():
        monkeypatch.setattr(limits, name, value)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # this process keeps its stderr

    def begin(rank: int = 0, ranks_in_all: int = 1, timeout: float = 1.0, launchers: tuple[int, ...] = ()) -> Rank:
        ranks.append(Rank(rank, ranks_in_all, timeout, list(launchers)))
        return ranks[-1]

    yield begin
    for each in ranks:
        each.process.kill()
        each.process.wait()
    for each in ranks:
        each.thread.join(PATIENCE_S)
        assert not each.thread.is_alive(), "a guardian ends with its rank"


def two(start: Start, timeout: float = 1.0) -> tuple[Rank, Rank]:
    first, second = start(0, 2, timeout), start(1, 2, timeout)
    second.control.send({"hub": ["127.0.0.1", first.hears("port"), first.guardian.others.token]})
    return first, second


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_rank_is_named_and_killed_and_the_other_is_told(victim: int, start: Start) -> None:
    ranks = two(start)
    other = ranks[1 - victim]
    other.lives(0.3)  # the guardians have met
    ranks[victim].process.send_signal(signal.SIGSTOP)
    entry = other.hears("board")[str(victim)]
    assert entry["silent"] or entry["unheard"], entry
    reason = other.hears("dead")
    assert reason.startswith(f"rank {victim} (host host{victim}) gave no sign of life for "), reason
    assert "it is stopped" in reason
    assert ranks[victim].process.wait(PATIENCE_S) == -signal.SIGKILL
    assert other.process.wait(PATIENCE_S) == -signal.SIGKILL, "it did not end by itself within the grace"


def test_a_rank_that_works_without_a_word_is_alive(start: Start) -> None:
    """As one that holds the interpreter in a long call: the index of a large data set is built so."""
    mine, its = socket.socketpair()
    busy = subprocess.Popen(["sh", "-c", "while :; do :; done"])
    watcher = Guardian(its, 0, 2, "host", busy.pid, [], timeout=0.3)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    time.sleep(1.5)
    assert busy.poll() is None
    busy.kill()
    busy.wait()
    thread.join(PATIENCE_S)
    mine.close()


def test_the_end_of_a_rank_with_a_note_is_the_end_of_the_job_for_that_reason(start: Start) -> None:
    first, second = two(start, timeout=20.0)
    first.lives(0.3)
    second.control.send({"stands": "read (disk.py:3)"})
    first.control.send({"note": "all_reduce failed", "is_cause": False})
    board: dict[str, Any] = {}
    while not ("note" in board.get("0", {}) and "stands" in board.get("1", {})):
        board |= second.hears("board")
    assert board["0"]["note"] == "all_reduce failed" and board["1"]["stands"] == "read (disk.py:3)"
    first.process.kill()
    first.process.wait()
    assert second.hears("dead") == 'rank 0 (host host0) ended with "all_reduce failed"'


def test_a_process_whose_name_is_cut_within_a_character() -> None:
    """The kernel keeps 15 bytes of a name."""
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    try:
        name.write_bytes("обучение".encode()[:15])
        with pytest.raises(UnicodeDecodeError):
            name.read_text(encoding="utf-8")
        assert Process(os.getpid()).state in ("R", "S")
    finally:
        name.write_bytes(before.rstrip())


def test_ranks_that_say_done_end_in_peace(start: Start) -> None:
    first, second = two(start)
    first.lives(0.3)
    second.control.send({"done": True})
    time.sleep(0.1)
    second.process.kill()
    second.process.wait()
    first.lives(0.8)  # longer than the grace
    assert not any("dead" in message for message in first.control.receive() or [])


def test_a_launcher_that_goes_or_is_stopped(start: Start) -> None:
    for number, code in ((signal.SIGKILL, None), (signal.SIGSTOP, -signal.SIGKILL)):
        launcher = subprocess.Popen(["sleep", "1000"])
        rank = start(timeout=0.5, launchers=(launcher.pid,))
        rank.lives(0.3)
        launcher.send_signal(number)
        assert rank.hears("launcher") == "lost"
        assert rank.process.wait(PATIENCE_S) == -signal.SIGTERM, "save and stop"
        rank.thread.join(PATIENCE_S)
        assert launcher.wait(PATIENCE_S) == (code or -number), "what is stopped is cleared away"


def test_a_paused_job_is_left_alone(start: Start) -> None:
    """Ctrl-Z stops launcher and ranks: that is its user's wish."""
    launcher = subprocess.Popen(["sleep", "1000"])
    rank = start(0, 2, timeout=0.3, launchers=(launcher.pid,))
    for process in (launcher, rank.process):
        process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    for process in (launcher, rank.process):
        process.send_signal(signal.SIGCONT)
    rank.lives(0.2)
    launcher.kill()
    launcher.wait()


def test_a_rank_that_is_paused_alone_ends_the_job(start: Start) -> None:
    first = start(0, 2)
    launcher = subprocess.Popen(["sleep", "1000"])
    second = start(1, 2, launchers=(launcher.pid,))
    second.control.send({"hub": ["127.0.0.1", first.hears("port"), first.guardian.others.token]})
    first.lives(0.3)
    for process in (launcher, second.process):
        process.send_signal(signal.SIGSTOP)
    assert first.hears("dead").startswith("rank 1 gave no sign of life for ")
    assert second.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert launcher.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_stranger_on_the_hubs_port_is_ignored(start: Start) -> None:
    first = start(0, 2)
    port = first.hears("port")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'GET / HTTP/1.1\r\n\r\n{"entry": {"gone": "x"}}\n')
        first.lives(0.3)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"rank": 1, "token": "guess"}\n{"entry": {"gone": "x", "host": "h"}}\n')
        first.lives(0.3)
    assert first.guardian.others.dead_at is None
