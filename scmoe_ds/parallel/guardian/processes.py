"""Processes of this host."""

from __future__ import annotations

import os
import signal
from contextlib import suppress


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
