"""Errors that several rooms raise and handle."""

from __future__ import annotations

from collections.abc import Sequence


class ExchangeError(RuntimeError):
    """An exchange that failed.

    Attributes:
        collective: what it was, in words that the ranks follow.
        ranks: global ranks of its group.
        peers: those of them whose connection failed, or all others.
        reason: the library's message.
    """

    def __init__(self, collective: str, ranks: Sequence[int], peers: Sequence[int], reason: str) -> None:
        super().__init__(f"{collective} {', '.join(map(str, ranks))} failed: {reason}")
        self.collective, self.ranks, self.peers, self.reason = collective, list(ranks), list(peers), reason
