"""What goes over the sockets between a rank, its guardian and the other guardians."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any


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
