"""Watches one rank and its launcher; `main` is the program."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress

from . import limits
from .lines import Lines
from .others import Hub, Member
from .processes import Process

_STOPPED = ("T", "t")


class Guardian:
    """Watches one rank.

    Args:
        control: a socket to the rank.
        rank, ranks: this one's number, and how many there are.
        host: this rank's, for messages.
        pid: its process.
        launchers: process ids.
        timeout: seconds.
    """

    def __init__(
        self, control: socket.socket, rank: int, ranks: int, host: str, pid: int, launchers: list[int], timeout: float
    ) -> None:
        self.control, self.rank, self.ranks, self.host, self.timeout = Lines(control), rank, ranks, host, timeout
        self.process, self.launchers = Process(pid), [Process(each) for each in launchers]
        self.now = self.last_sign = 0.0
        self.done = self.left = self.told_to_stop = self.silent = False
        self.why = ""  # the rank was killed
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self._from_rank)
        self.others = (Member if rank else Hub)(self.control, self.selector, rank, ranks, host, timeout)

    def run(self) -> None:
        """Until the rank has ended, and, for the hub, until the others have been told."""
        before = time.monotonic()
        while self.process.state and not (self.done and self.left):
            while (left := before + limits.TICK_S - time.monotonic()) > 0:
                self._poll(left)
            elapsed, before = time.monotonic() - before, time.monotonic()
            elapsed = min(elapsed, 2 * limits.TICK_S)
            self._advance(elapsed)
            self._watch_rank()
            self._watch_launchers(elapsed)
            self.others.watch()
        self._poll(0)  # its last words
        self._end()

    def _advance(self, elapsed: float) -> None:
        self.now += elapsed
        self.others.now = self.now

    def _poll(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()

    def _from_rank(self) -> None:
        messages = self.control.receive()
        if messages is None:
            self.selector.unregister(self.control.socket)
            self.left = True
            return
        self.last_sign = self.now
        for message in messages:
            if "hub" in message and isinstance(self.others, Member):
                self.others.connect(*message["hub"])
            self.done = self.done or "done" in message
            if "step" in message:
                self.others.count(message["step"])
            if "stands" in message:
                self.others.report({"stands": message["stands"]})
            if "note" in message:
                self.others.report({key: message.get(key) for key in ("note", "is_cause", "code")})

    def _watch_rank(self) -> None:
        state = self.process.state
        if state not in _STOPPED and self.process.has_worked():
            self.last_sign = self.now
        silent_s = self.now - self.last_sign
        # The user has pressed Ctrl-Z. If other ranks go on, the hub will end the job.
        paused = state in _STOPPED and any(each.state in _STOPPED for each in self.launchers)
        if (silent_s > min(limits.SILENT_S, self.timeout / 2)) != self.silent:
            self.silent = not self.silent
            self.others.report({"silent": self.silent})
        if self.ranks > 1 and silent_s > self.timeout and not paused and not self.why:
            how = "it is stopped" if state in _STOPPED else "it hangs"
            self._kill(f"gave no sign of life for {silent_s:.0f} s ({how}) and was killed")
        died_at = self.others.dead_at
        if died_at is not None and (self.now > died_at + limits.GRACE_S or state in _STOPPED) and not self.why:
            self._kill("did not end when the job ended and was killed")

    def _kill(self, why: str) -> None:
        self.why = why
        with suppress(OSError):
            os.write(2, f"scmoe_ds: rank {self.rank} (host {self.host}) {why}\n".encode())
        self.process.kill(signal.SIGKILL)

    def _watch_launchers(self, elapsed: float) -> None:
        for each in self.launchers:
            each.stopped_s = each.stopped_s + elapsed if each.state in _STOPPED else 0.0
        lost = any(not each.state or each.stopped_s > self.timeout for each in self.launchers)
        if lost and not self.told_to_stop and self.process.state not in _STOPPED:
            self.told_to_stop = True
            self.control.send({"launcher": "lost"})
            self.process.kill(signal.SIGTERM)

    def _end(self) -> None:
        if not self.done:
            self.others.report({"gone": self.why or "has ended without a word"})
        for each in self.launchers:  # a stopped one would never notice that its rank has ended
            if each.state in _STOPPED and (
                self.others.dead_at is not None or not self.done or each.stopped_s > self.timeout
            ):
                each.kill(signal.SIGKILL)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)  # whoever reads the rank's log waits for its end
        end = self.now + limits.LINGER_S
        while self.now < end and self.others.listening:
            time.sleep(limits.TICK_S)
            self._advance(limits.TICK_S)
            self._poll(0)
            self.others.tell_all({})


def main() -> None:
    """Arguments: the control socket's descriptor, and `Guardian`'s as JSON."""
    if os.fork():  # an orphan: neither waited for nor taken for a child of the rank
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal or a scheduler: this process ends with its rank
    os.chdir("/")
    control = socket.socket(fileno=int(sys.argv[1]))
    Guardian(control, **json.loads(sys.argv[2])).run()
