"""The rank's side of its guardian: sends signs of life, hears of other ranks, and handles signals before training."""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scmoe_ds.parallel import stopping
from scmoe_ds.parallel.guardian.lines import Lines
from scmoe_ds.parallel.launchers import launchers
from scmoe_ds.parallel.standing import Standing

_PROGRAM = Path(__file__).with_name("guardian")
_BEAT_S = 1.0
_OWN_WORDS_S = 5.0
"""When the job is dead, the main thread has this long to end with its own message."""
_STANDS_S = 3.0
NOTE_LENGTH = 400

active: Watch | None = None
"""The watch of this process while a program runs."""


class Watch:
    """Watches over this rank while a program runs, from before the ranks meet.

    Args:
        program: for messages.
        timeout_s: the guardian ends a rank after this long without a sign of life.

    Attributes:
        board: other ranks in trouble: rank to "host", "note", "is_cause", "code" (of its exit, when it prints its
            note), "silent" (no sign of life), "unheard" (no sign of its host either), "stands" (where its main thread
            has been for seconds), "gone".
    """

    def __init__(self, program: str, timeout_s: float) -> None:
        self.program = program
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.board: dict[int, dict[str, Any]] = {}
        self.launcher_is_lost = self._closing = False
        self._hub: dict[str, Any] | None = None
        self._joined: bool | None = None  # whether the guardians of all ranks are connected
        self._steps, self._reached, self._news = itertools.count(1), 0, threading.Event()
        self._limit: tuple[float, str] | None = None
        self._standing, self._since, self._place = Standing(), 0.0, ""
        self._dead: tuple[str, float] | None = None  # why, and since when
        self._selector = selectors.DefaultSelector()
        self._control = self._start_guardian(timeout_s)
        self._wakeup, wake = socket.socketpair()
        for end in (self._wakeup, wake):
            end.setblocking(False)
        self._wake = wake
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="scmoe-watch", daemon=True)

    def __enter__(self) -> Watch:
        global active
        active = self
        os.register_at_fork(after_in_child=self._in_child)
        self._listen_to_signals()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global active
        active, self._closing = None, True
        self.done()
        self._ignore_signals()
        self._wake.send(b"\0")
        self._thread.join()
        for each in (self._control.socket if self._control else None, self._wakeup, self._wake):
            if each is not None:
                each.close()

    @contextmanager
    def limit(self, seconds: float, words: str) -> Iterator[None]:
        """Ends this process with exit code 2 and a sentence if the block takes longer."""
        self._limit = (time.monotonic() + seconds, words)
        try:
            yield
        finally:
            self._limit = None

    def join(self, timeout_s: float = 6.0) -> None:
        """Connects the guardians. Call it as soon as there is a process group. Collective."""
        if self.ranks == 1:
            return
        deadline = time.monotonic() + timeout_s
        if self.rank == 0:
            while self._hub is None and self._control is not None and time.monotonic() < deadline:
                time.sleep(0.01)
        hubs = [self._hub]
        dist.broadcast_object_list(hubs)
        if self.rank and hubs[0] is not None and self._control is not None:
            address = [os.environ["MASTER_ADDR"], hubs[0]["port"], hubs[0]["token"]]
            self._control.send({"hub": address})
            while self._joined is None and time.monotonic() < deadline:
                time.sleep(0.01)
        joined: list[Any] = [None] * self.ranks
        dist.all_gather_object(joined, bool(self._joined) if self.rank else hubs[0] is not None)
        self._joined = all(joined) and self._joined is not False

    def wait_for_all(self) -> None:
        """Returns when all ranks have called it, however long that takes. Collective.

        It uses neither torch's store, which may belong to a launcher that has gone, nor a collective with its timeout.
        When the guardians are not connected, it returns at once.
        """
        step = next(self._steps)
        self._send({"step": step})
        while self._joined and self._reached < step:
            self._news.wait(1.0)
            self._news.clear()

    def note(self, text: str, is_cause: bool, code: int | None = None) -> None:
        """Tells the other ranks why this one ends, and with which exit code, when it prints the reason by itself."""
        self._send({"note": text[:NOTE_LENGTH], "is_cause": is_cause, "code": code})

    def done(self) -> None:
        """Tells the other ranks that this one ends as it should."""
        self._send({"done": True})

    def _send(self, message: dict[str, Any]) -> None:
        if self._control is not None:
            self._control.send(message)

    def _start_guardian(self, timeout_s: float) -> Lines | None:
        above = [process.pid for process in launchers()]
        if self.ranks == 1 and not above:
            return None  # nobody waits for this process, or ends it
        mine, its = socket.socketpair()
        settings = {
            "rank": self.rank,
            "ranks": self.ranks,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "launchers": above,
            "timeout": timeout_s,
        }
        command = [sys.executable, "-I", "-S", str(_PROGRAM), str(its.fileno()), json.dumps(settings)]
        try:
            null = subprocess.DEVNULL
            options: dict[str, Any] = {"stdin": null, "stdout": null, "pass_fds": [its.fileno()]}
            subprocess.Popen(command, **options, start_new_session=True).wait()  # it forks: its child is the guardian
        except OSError as error:  # no process or memory left: the job can go on without
            print(f"{self.program}: no guardian for rank {self.rank}: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            its.close()
        self._selector.register(mine, selectors.EVENT_READ)
        return Lines(mine)

    def _listen_to_signals(self) -> None:
        """Makes a signal outside training end the process, even when the main thread waits in a collective."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, lambda *_: None) for number in stopping.SIGNALS}
            signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        else:
            self._before = {}

    def _ignore_signals(self) -> None:
        """Takes back what `_listen_to_signals` did."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}

    def _in_child(self) -> None:
        """Gives a forked process its own signal handling. But a launcher's SIGTERM also reaches data loader workers,
        which the rank still needs for its last step: during training they ignore it, and they end with the rank."""
        if stopping.listening:
            if self._before:
                signal.set_wakeup_fd(-1)
        else:
            self._ignore_signals()

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(_BEAT_S):
                if key.fileobj is self._wakeup:
                    self._hear_signals()
                else:
                    self._hear_guardian()
            self._send({})
            self._tell_where_it_stands()
            limit = self._limit  # the main thread may reset it at any moment
            if limit is not None and time.monotonic() > limit[0]:
                self._end(2, limit[1])
            if self._dead is not None and time.monotonic() > self._dead[1] + _OWN_WORDS_S:
                self._end(1, f"rank {self.rank} (host {socket.gethostname()}): the job has ended: {self._dead[0]}")

    def _tell_where_it_stands(self) -> None:
        """Tells the hub where the main thread has been for some seconds, unless it waits for other ranks."""
        place = ""
        if self._standing.has_moved():
            self._since = time.monotonic()
        elif time.monotonic() - self._since < _STANDS_S or self._standing.waits_for_ranks:
            return
        else:
            place = self._standing.place
        if place != self._place:
            self._place = place
            self._send({"stands": place})

    def _hear_signals(self) -> None:
        for number in self._wakeup.recv(64):
            if number in stopping.SIGNALS and not stopping.listening and not self._closing:
                what = f"{signal.Signals(number).name} received"
                self.note(what, is_cause=True)
                words = "the launcher has gone" if self.launcher_is_lost else what
                # Rank 0 speaks for all. When a rank has failed, the signal is only the launcher ending the others.
                is_told = self.rank == 0 and self._dead is None and not any("note" in e for e in self.board.values())
                said = f"{words}, and training has not begun: ended, nothing was saved"
                self._end(128 + number, said if is_told else None)

    def _hear_guardian(self) -> None:
        assert self._control is not None
        messages = self._control.receive()
        if messages is None:
            self._selector.unregister(self._control.socket)
            self._joined = False
            return
        for message in messages:
            self._hub = message if "port" in message else self._hub
            self._joined = message.get("joined", self._joined)
            self._reached = message.get("reached", self._reached)
            self._news.set()
            if "launcher" in message:
                self.launcher_is_lost = True
                what = f"{self.program}: the launcher of rank {self.rank} has gone or is stopped"
                print(f"{what}: the job ends as after SIGTERM", file=sys.stderr, flush=True)
            for rank, entry in message.get("board", {}).items():
                self.board[int(rank)] = entry
            if "dead" in message:
                self._dead = (message["dead"], time.monotonic())

    def _end(self, code: int, words: str | None) -> None:
        if words is not None:
            print(f"{self.program}: error: {words}", file=sys.stderr, flush=True)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
