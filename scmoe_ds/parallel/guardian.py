"""A small process beside each rank: it sees whether the rank lives, tells the other ranks, and ends one that hangs.

A rank that is stopped, or whose interpreter hangs, can do nothing of this itself. `scmoe_ds.parallel.watch` starts this
file as a program of its own (no package is imported: 20 ms, 8 MB), in a session of its own. All guardians are connected
to the one of rank 0, the hub, which repeats what one of them reports to all others.

A rank that gives no sign of life for the timeout is killed: its connections close, and its peers and its launcher
notice. When a rank has ended without having said "done", the job is dead: ranks that do not end by themselves are
killed after a grace. When the launcher is gone, or stopped for the timeout, the rank gets SIGTERM (save and stop).

Time is counted in ticks of this process, so that a machine that slept has not been silent.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

TICK_S = 0.5
SILENT_S = 3.0
"""A rank is named to the others after this long without a sign of life."""
GRACE_S = 10.0
"""From the job's death to the end of ranks that did not end by themselves."""
LINGER_S = 15.0
_TOLD = 64  # ranks whose ends are repeated to all others: in a large job the first ones matter
_STOPPED = ("T", "t")


class Process:
    """A process of this host, known by id and start time: ids are used again."""

    def __init__(self, pid: int) -> None:
        self.pid, self.stopped_s = pid, 0.0
        found = self._stat()
        self.start = found[2] if found else None
        self._cpu = found[1] if found else 0

    def _stat(self) -> tuple[str, int, str] | None:
        """State, clock ticks of work, start."""
        try:
            with open(f"/proc/{self.pid}/stat", errors="replace") as stream:  # the kernel cuts a name anywhere
                fields = stream.read().rsplit(")", 1)[1].split()
        except OSError:
            return None
        return fields[0], int(fields[11]) + int(fields[12]), fields[19]

    @property
    def state(self) -> str:
        """As in /proc: "R", "S", "T", …; "" once it has ended."""
        found = self._stat()
        return "" if found is None or found[2] != self.start or found[0] in "ZX" else found[0]

    def has_worked(self) -> bool:
        """Whether it has used the processor since the last call."""
        found = self._stat()
        before, self._cpu = self._cpu, found[1] if found else self._cpu
        return self._cpu > before

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal, if it still is that process."""
        if self.state:
            with suppress(OSError):
                os.kill(self.pid, number)


class Lines:
    """JSON values, one a line, over a socket; what cannot be sent at once is lost."""

    def __init__(self, connection: socket.socket, rank: int | None = None) -> None:
        self.socket, self.rank, self._received = connection, rank, b""
        connection.setblocking(False)

    def send(self, value: Any) -> None:
        with suppress(OSError):
            self.socket.send(json.dumps(value).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has come; None once the other end has closed, or speaks something else."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            values = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return values if all(isinstance(value, dict) for value in values) else None


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
        self.done = self.left = self.dead = self.told_to_stop = False
        self.kill_at: float | None = None
        self.why = ""  # the rank was killed
        self.silent = False
        self.token = ""
        self.selector = selectors.DefaultSelector()
        self.selector.register(control, selectors.EVENT_READ, self._from_rank)
        self.server: socket.socket | None = None
        self.hub: Lines | None = None
        self.members: dict[int, Lines] = {}  # of the hub: rank to connection
        self.heard: dict[int, float] = {}  # of the hub: rank to the time of its last word; of others: 0 to the hub's
        self.board: dict[int, dict[str, Any]] = {}
        self.arrived: dict[int, int] = {}  # of the hub: step to the number of ranks that have come to it
        self.silent_since: dict[int, float] = {}  # of the hub
        self.standing: dict[int, dict[str, Any]] = {}  # of the hub: where main threads have been for some seconds
        if rank == 0 and ranks > 1:
            self._listen()

    def run(self) -> None:
        """Until the rank has ended, and, for the hub, until the others have been told."""
        before = time.monotonic()
        while self.process.state and not (self.done and self.left):
            while (left := before + TICK_S - time.monotonic()) > 0:
                self._poll(left)
            elapsed, before = time.monotonic() - before, time.monotonic()
            self.now += min(elapsed, 2 * TICK_S)
            self._watch_rank()
            self._watch_launchers(elapsed=min(elapsed, 2 * TICK_S))
            self._watch_others()
        self._poll(0)  # its last words
        self._end()

    def _poll(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout):
            key.data()

    # ---- the rank

    def _from_rank(self) -> None:
        messages = self.control.receive()
        if messages is None:
            self.selector.unregister(self.control.socket)
            self.left = True
            return
        self.last_sign = self.now
        for message in messages:
            if "hub" in message:
                self._connect(*message["hub"])
            self.done = self.done or "done" in message
            if "step" in message:
                if self.rank == 0:
                    self._count(message["step"])
                elif self.hub is not None:
                    self.hub.send({"step": message["step"]})
            if "stands" in message:
                self._report({"stands": message["stands"]})
            if "note" in message:
                self._report({"note": message["note"], "is_cause": message["is_cause"]})

    def _watch_rank(self) -> None:
        state = self.process.state
        if state not in _STOPPED and self.process.has_worked():
            self.last_sign = self.now
        silent_s = self.now - self.last_sign
        # The user has pressed Ctrl-Z. If other ranks go on, the hub will end the job.
        paused = state in _STOPPED and any(each.state in _STOPPED for each in self.launchers)
        if (silent_s > min(SILENT_S, self.timeout / 2)) != self.silent:
            self.silent = not self.silent
            self._report({"silent": self.silent})
        if self.ranks > 1 and silent_s > self.timeout and not paused and not self.why:
            how = "it is stopped" if state in _STOPPED else "it hangs"
            self._kill(f"gave no sign of life for {silent_s:.0f} s ({how}) and was killed")
        elif self.kill_at is not None and (self.now > self.kill_at or state in _STOPPED) and not self.why:
            self._kill("did not end when the job ended and was killed")

    def _kill(self, why: str) -> None:
        self.why = why
        with suppress(OSError):
            os.write(2, f"scmoe_ds: rank {self.rank} (host {self.host}) {why}\n".encode())
        self.process.kill(signal.SIGKILL)

    # ---- the launcher

    def _watch_launchers(self, elapsed: float) -> None:
        for each in self.launchers:
            each.stopped_s = each.stopped_s + elapsed if each.state in _STOPPED else 0.0
        lost = any(not each.state or each.stopped_s > self.timeout for each in self.launchers)
        if lost and not self.told_to_stop and self.process.state not in _STOPPED:
            self.told_to_stop = True
            self.control.send({"launcher": "lost"})
            self.process.kill(signal.SIGTERM)

    # ---- the other ranks

    def _listen(self) -> None:
        self.server = socket.create_server(("", 0), backlog=1024)
        self.server.setblocking(False)
        self.token = os.urandom(8).hex()
        self.selector.register(self.server, selectors.EVENT_READ, self._accept)
        self.control.send({"port": self.server.getsockname()[1], "token": self.token})

    def _accept(self) -> None:
        assert self.server is not None
        with suppress(OSError):
            connection, _ = self.server.accept()
            lines = Lines(connection)
            self.selector.register(connection, selectors.EVENT_READ, lambda: self._from_member(lines))

    def _connect(self, address: str, port: int, token: str) -> None:
        try:
            connection = socket.create_connection((address, port), timeout=5)
        except OSError:
            self.control.send({"joined": False})  # this rank is watched here alone
            return
        self.control.send({"joined": True})
        self.hub = Lines(connection)
        self.hub.send({"rank": self.rank, "token": token})
        self.heard[0] = self.now
        self.selector.register(connection, selectors.EVENT_READ, self._from_hub)

    def _from_member(self, lines: Lines) -> None:
        messages = lines.receive()
        if messages is None:
            self.selector.unregister(lines.socket)
            lines.socket.close()
            if lines.rank is not None:  # without a word of its rank: somebody has killed the guardian alone
                del self.members[lines.rank]
                self.heard.pop(lines.rank, None)
                self._tell_all({"joined": False})
            return
        for message in messages:
            if lines.rank is None and message.get("token") == self.token:
                lines.rank = message["rank"]
                self.members[lines.rank] = lines
                if self.board:
                    lines.send({"board": self.board})
            if lines.rank is None:
                continue  # a stranger
            self.heard[lines.rank] = self.now
            if "step" in message:
                self._count(message["step"])
            if "entry" in message:
                self._note(lines.rank, message["entry"])

    def _from_hub(self) -> None:
        assert self.hub is not None
        messages = self.hub.receive()
        if messages is None:
            self.selector.unregister(self.hub.socket)
            self.hub = None
            self.heard.clear()
            self.control.send({"joined": False})
            return
        self.heard[0] = self.now
        if self.board.get(0, {}).pop("unheard", False):
            self.control.send({"board": {0: self.board[0]}})
        for message in messages:
            if "board" in message:
                self.board.update({int(rank): entry for rank, entry in message["board"].items()})
                self.control.send({"board": message["board"]})
            if "dead" in message:
                self._die(message["dead"])
            if "reached" in message or "joined" in message:
                self.control.send(message)

    def _count(self, step: int) -> None:
        """On the hub: one more rank has come to a step."""
        self.arrived[step] = self.arrived.get(step, 0) + 1
        if self.arrived[step] == self.ranks:
            del self.arrived[step]
            self._tell_all({"reached": step})

    def _report(self, entry: dict[str, Any]) -> None:
        """Tells all ranks something about this one."""
        entry = {"host": self.host, **entry}
        if self.rank == 0:
            self._note(0, entry)
        elif self.hub is not None:
            self.hub.send({"entry": entry})

    def _note(self, rank: int, entry: dict[str, Any]) -> None:
        """On the hub: news of a rank."""
        if "stands" in entry:  # ordinary in a long step: told only when a rank has failed
            self.standing[rank] = entry
            return
        if entry.get("silent"):
            self.silent_since.setdefault(rank, self.now)
        elif "silent" in entry:
            self.silent_since.pop(rank, None)
        told = [rank]
        if "note" in entry:
            told += [other for other, its in self.standing.items() if its["stands"] and other != rank]
        for each in told[:_TOLD]:
            self.board[each] = {
                **self.board.get(each, {}),
                **self.standing.get(each, {}),
                **(entry if each == rank else {}),
            }
        if len(self.board) <= 2 * _TOLD:
            self._tell_all({"board": {each: self.board[each] for each in told[:_TOLD]}})
        if "gone" in entry:
            note = self.board[rank].get("note")
            how = entry["gone"] if note is None else f'ended with "{note}"'
            self._die(f"rank {rank} (host {entry['host']}) {how}")

    def _watch_others(self) -> None:
        if self.rank == 0:
            for lines in self.members.values():
                lines.send({})
            if len(self.silent_since) <= len(self.members):  # otherwise the whole job is paused
                for rank, since in self.silent_since.items():
                    if self.now - since > self.timeout:
                        self._die(f"rank {rank} gave no sign of life for {self.now - since:.0f} s")
            for rank, heard in self.heard.items():
                silent_s, known = self.now - heard, self.board.get(rank, {})
                if (silent_s > SILENT_S) != known.get("unheard", False):
                    self._note(rank, {"unheard": silent_s > SILENT_S, "host": known.get("host")})
                if silent_s > self.timeout:
                    self._die(f"nothing was heard of rank {rank} or its host for {silent_s:.0f} s")
        else:
            if self.hub is not None:
                self.hub.send({})
            silent_s = self.now - self.heard.get(0, self.now)
            if silent_s > SILENT_S and not self.board.get(0, {}).get("unheard"):
                self.board[0] = {**self.board.get(0, {}), "unheard": True}
                self.control.send({"board": {0: self.board[0]}})
            if silent_s > self.timeout:
                self._die(f"nothing was heard of rank 0 or its host for {silent_s:.0f} s")

    def _tell_all(self, message: Any) -> None:
        self.control.send(message)
        for lines in self.members.values():
            lines.send(message)

    def _die(self, reason: str) -> None:
        """The job is dead."""
        if self.dead:
            return
        self.dead, self.kill_at = True, self.now + GRACE_S
        self._tell_all({"dead": reason})

    def _end(self) -> None:
        if not self.done:
            self._report({"gone": self.why or "has ended without a word"})
        for each in self.launchers:  # a stopped one would never notice that its rank has ended
            if each.state in _STOPPED and (self.dead or not self.done or each.stopped_s > self.timeout):
                each.kill(signal.SIGKILL)
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)  # whoever reads the rank's log waits for its end
        end = self.now + LINGER_S
        # Nothing is said to members beyond a link that is cut.
        while self.now < end and any(self.now - self.heard[rank] <= SILENT_S for rank in self.members):
            time.sleep(TICK_S)
            self.now += TICK_S
            self._poll(0)
            self._tell_all({})


def main() -> None:
    """Arguments: the control socket's descriptor, and `Guardian`'s as JSON."""
    if os.fork():  # an orphan: neither waited for nor taken for a child of the rank
        os._exit(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal or a scheduler: this process ends with its rank
    os.chdir("/")
    control = socket.socket(fileno=int(sys.argv[1]))
    Guardian(control, **json.loads(sys.argv[2])).run()


if __name__ == "__main__":
    main()
