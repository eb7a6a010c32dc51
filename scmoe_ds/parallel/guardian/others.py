"""What the guardians of a job tell each other about their ranks, all through that of rank 0."""

from __future__ import annotations

import os
import selectors
import socket
from contextlib import suppress
from typing import Any

from . import limits
from .lines import Lines

_TOLD = 64  # ranks whose ends are repeated to all others: in a large job the first ones matter


class Others:
    """One guardian's connection to the others, and what is known of their ranks.

    Args:
        control: to the own rank, which hears what the others report.
        selector: calls what reads a connection.
        rank, ranks: the own rank's number, and how many there are.
        host: the own rank's, for messages.
        timeout: seconds.

    Attributes:
        now: the guardian's clock.
        dead_at: when the job has died.
        board: news of each rank.
    """

    def __init__(
        self, control: Lines, selector: selectors.BaseSelector, rank: int, ranks: int, host: str, timeout: float
    ) -> None:
        self.control, self.selector = control, selector
        self.rank, self.ranks, self.host, self.timeout = rank, ranks, host, timeout
        self.now = 0.0
        self.dead_at: float | None = None
        self.board: dict[int, dict[str, Any]] = {}
        self.begin()

    def begin(self) -> None:
        """What this guardian keeps, and where it listens."""

    def report(self, entry: dict[str, Any]) -> None:
        """Tells all ranks something about the own one."""
        raise NotImplementedError

    def count(self, step: int) -> None:
        """The own rank has come to a step; all are told once every rank has."""
        raise NotImplementedError

    def watch(self) -> None:
        """Once a tick: gives a sign of life, and says of whom there was none."""
        raise NotImplementedError

    def tell_all(self, message: Any) -> None:
        """To the own rank, and by the hub to the others."""
        self.control.send(message)

    @property
    def listening(self) -> bool:
        """Whether others still hear what this guardian says."""
        return False

    def die(self, reason: str) -> None:
        """The job is dead."""
        if self.dead_at is None:
            self.dead_at = self.now
            self.tell_all({"dead": reason})


class Hub(Others):
    """The guardian of rank 0, to which all others are connected."""

    def begin(self) -> None:
        self.members: dict[int, Lines] = {}
        self.heard: dict[int, float] = {}  # rank to the time of its last word
        self.arrived: dict[int, int] = {}  # step to the number of ranks that have come to it
        self.silent_since: dict[int, float] = {}
        self.standing: dict[int, dict[str, Any]] = {}  # where main threads have been for some seconds
        self.token = os.urandom(8).hex()
        if self.ranks > 1:
            self.server = socket.create_server(("", 0), backlog=1024)
            self.server.setblocking(False)
            self.selector.register(self.server, selectors.EVENT_READ, self._accept)
            self.control.send({"port": self.server.getsockname()[1], "token": self.token})

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self.server.accept()
            lines = Lines(connection)
            self.selector.register(connection, selectors.EVENT_READ, lambda: self._from_member(lines))

    def _from_member(self, lines: Lines) -> None:
        messages = lines.receive()
        if messages is None:
            self.selector.unregister(lines.socket)
            lines.socket.close()
            if lines.rank is not None:  # without a word of its rank: somebody has killed the guardian alone
                del self.members[lines.rank]
                self.heard.pop(lines.rank, None)
                self.tell_all({"joined": False})
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
                self.count(message["step"])
            if "entry" in message:
                self._note(lines.rank, message["entry"])

    def report(self, entry: dict[str, Any]) -> None:
        self._note(self.rank, {"host": self.host, **entry})

    def _note(self, rank: int, entry: dict[str, Any]) -> None:
        """News of a rank."""
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
            news = entry if each == rank else {}
            self.board[each] = {**self.board.get(each, {}), **self.standing.get(each, {}), **news}
        if len(self.board) <= 2 * _TOLD:
            self.tell_all({"board": {each: self.board[each] for each in told[:_TOLD]}})
        if "gone" in entry:
            note = self.board[rank].get("note")
            how = entry["gone"] if note is None else f'ended with "{note}"'
            self.die(f"rank {rank} (host {entry['host']}) {how}")

    def count(self, step: int) -> None:
        self.arrived[step] = self.arrived.get(step, 0) + 1
        if self.arrived[step] == self.ranks:
            del self.arrived[step]
            self.tell_all({"reached": step})

    def watch(self) -> None:
        for lines in self.members.values():
            lines.send({})
        if len(self.silent_since) <= len(self.members):  # otherwise the whole job is paused
            for rank, since in self.silent_since.items():
                if self.now - since > self.timeout:
                    self.die(f"rank {rank} gave no sign of life for {self.now - since:.0f} s")
        for rank, heard in self.heard.items():
            silent_s, known = self.now - heard, self.board.get(rank, {})
            if (silent_s > limits.SILENT_S) != known.get("unheard", False):
                self._note(rank, {"unheard": silent_s > limits.SILENT_S, "host": known.get("host")})
            if silent_s > self.timeout:
                self.die(f"nothing was heard of rank {rank} or its host for {silent_s:.0f} s")

    def tell_all(self, message: Any) -> None:
        super().tell_all(message)
        for lines in self.members.values():
            lines.send(message)

    @property
    def listening(self) -> bool:
        # Nothing is said to members beyond a link that is cut.
        return any(self.now - self.heard[rank] <= limits.SILENT_S for rank in self.members)


class Member(Others):
    """The guardian of another rank."""

    def begin(self) -> None:
        self.hub: Lines | None = None
        self._heard: float | None = None  # when the hub's last word came

    def connect(self, address: str, port: int, token: str) -> None:
        """To the hub; without it the own rank is watched here alone."""
        try:
            connection = socket.create_connection((address, port), timeout=5)
        except OSError:
            self.control.send({"joined": False})
            return
        self.control.send({"joined": True})
        self.hub = Lines(connection)
        self.hub.send({"rank": self.rank, "token": token})
        self._heard = self.now
        self.selector.register(connection, selectors.EVENT_READ, self._from_hub)

    def _from_hub(self) -> None:
        assert self.hub is not None
        messages = self.hub.receive()
        if messages is None:
            self.selector.unregister(self.hub.socket)
            self.hub = self._heard = None
            self.control.send({"joined": False})
            return
        self._heard = self.now
        if self.board.get(0, {}).pop("unheard", False):
            self.control.send({"board": {0: self.board[0]}})
        for message in messages:
            if "board" in message:
                self.board.update({int(rank): entry for rank, entry in message["board"].items()})
                self.control.send({"board": message["board"]})
            if "dead" in message:
                self.die(message["dead"])
            if "reached" in message or "joined" in message:
                self.control.send(message)

    def report(self, entry: dict[str, Any]) -> None:
        self._say({"entry": {"host": self.host, **entry}})

    def count(self, step: int) -> None:
        self._say({"step": step})

    def watch(self) -> None:
        self._say({})
        silent_s = 0.0 if self._heard is None else self.now - self._heard
        if silent_s > limits.SILENT_S and not self.board.get(0, {}).get("unheard"):
            self.board[0] = {**self.board.get(0, {}), "unheard": True}
            self.control.send({"board": {0: self.board[0]}})
        if silent_s > self.timeout:
            self.die(f"nothing was heard of rank 0 or its host for {silent_s:.0f} s")

    def _say(self, message: dict[str, Any]) -> None:
        if self.hub is not None:
            self.hub.send(message)
