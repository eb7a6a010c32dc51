"""Ends a rank that cannot continue while others wait for it, promptly and with one message.

A killed process cannot print anything. The other ranks see a closed connection, or wait until their timeout. Each of
them then says what it was doing and with which ranks. The guardians know all ranks (`watch.Watch.board`), and so the
message also names the ranks at fault.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.distributed as dist

from scmoe_ds.errors import ExchangeError
from scmoe_ds.parallel import watch
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.error_text import in_words, print_stack, short
from scmoe_ds.parallel.watch import NOTE_LENGTH

_NOTES_WAIT_S = 2.0
"""How long a failing rank waits to hear that another rank is the cause."""
_SIGNS = re.compile(
    r"connection (closed|reset|refused|abort)|timed out|timeout|broken pipe|no route to host|"
    r"network is unreachable|nccl|socket|remote process exited",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FailedCollective:
    """A collective that failed.

    Attributes:
        name: in words that the ranks follow.
        ranks: global ranks of its group.
        peers: those that may be the cause.
        reason: the library's message.
    """

    name: str
    ranks: Sequence[int]
    peers: Sequence[int]
    reason: str


def failed_collective(error: BaseException) -> FailedCollective | None:
    """The collective that an exception is about; None if it is not about communication."""
    for each in _chain(error):
        if isinstance(each, ExchangeError):
            return FailedCollective(each.collective, each.ranks, each.peers, short(each.reason))
    is_sign = isinstance(error, RuntimeError) and _SIGNS.search(str(error)) and "DataLoader" not in str(error)
    if not (isinstance(error, dist.DistError) or is_sign):
        return None
    name, ranks = _in_traceback(error)
    return FailedCollective(name, ranks, [rank for rank in ranks if rank != dist.get_rank()], short(str(error)))


def at_iteration(error: Exception, iteration: int) -> None:
    """Adds the iteration to an exception, for its message."""
    error.scmoe_iteration = iteration  # type: ignore[attr-defined]  # a mark of ours


class FailureReporter:
    """Ends a process that failed in the middle of a job. Made by all ranks together.

    One rank speaks: the one that is at fault, or the first of each host where it died without a word.

    Args:
        program: for the message.
        debug: every rank speaks, with its stack.
    """

    def __init__(self, program: str, debug: bool = False) -> None:
        self.program, self.debug, self.rank = program, debug, dist.get_rank()
        self.hosts = gather(socket.gethostname())

    def note(self, text: str, is_cause: bool = True, code: int | None = None) -> None:
        """Tells the other ranks why this one ends.

        Args:
            code: this rank's exit code, when it prints its reason by itself.
        """
        if watch.active is not None:
            watch.active.note(text, is_cause, code)

    def speaks(self, text: str, code: int) -> bool:
        """Whether this rank prints an error that is usually the same on all ranks: it is rank 0 or failed alone."""
        self.note(text, code=code)
        if self.rank == 0 or self.debug:
            return True
        found = self._board(until=lambda board: "note" in board.get(0, {}))
        return found.get(0, {}).get("note") != text[:NOTE_LENGTH]

    def end(self, error: Exception | SystemExit) -> NoReturn:
        """Says on one rank what has failed, and ends this process, with exit code 1 when no other rank has another.

        A failure of this rank is told with its traceback. A failed exchange is mostly another rank's fault, which that
        rank tells.

        Does not destroy process groups: other ranks may hang in a collective, and this rank would wait for them.
        """
        if threading.current_thread() is threading.main_thread():  # others may not, and the main thread stands then
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it as soon as any rank has ended
        collective = failed_collective(error)
        if collective is None:
            if self.speaks(in_words(error), code=1):
                print_stack(error, self.debug)
                self._print(error, f"{in_words(error)} (see the traceback above)")
            leave(1)
        self.note(_describe(collective), is_cause=False)
        cause = self._cause()
        if self.debug or ((cause is None or self.hosts[cause] != self._host) and self._is_first_of_host()):
            if self.debug or cause is None:
                print_stack(error, self.debug)
            self._print(error, f"{_describe(collective)}. {self._who()}. {_remedy(collective.reason)}")
        leave(1 if cause is None else self._others()[cause]["code"])

    def _print(self, error: BaseException, told: str) -> None:
        iteration = getattr(error, "scmoe_iteration", None)
        where = f"{self._named(self.rank)}{'' if iteration is None else f', iteration {iteration}'}"
        print(f"{self.program}: error: {where}: {told}", file=sys.stderr, flush=True)

    def _cause(self) -> int | None:
        """The rank that is at fault and says so by itself."""

        def is_known(board: dict[int, dict[str, Any]]) -> bool:
            return any(entry.get("code") is not None or _died(entry) for entry in board.values())

        board = self._board(until=is_known)
        return next((rank for rank, entry in board.items() if entry.get("code") is not None), None)

    @property
    def _host(self) -> str:
        return self.hosts[self.rank]

    def _is_first_of_host(self) -> bool:
        """Whether no lower rank of this host has failed in an exchange, too, and speaks."""
        lower = [rank for rank in range(self.rank) if self.hosts[rank] == self._host]

        def is_known(board: dict[int, dict[str, Any]]) -> bool:
            return all("note" in (entry := board.get(rank, {})) or _is_culprit(entry) for rank in lower)

        board = self._board(until=is_known)
        return not any(board.get(rank, {}).get("is_cause") is False for rank in lower)

    def _who(self) -> str:
        """Names the ranks at fault, which may be in another group: a failure spreads from group to group."""
        board = self._board(until=lambda board: any(map(_is_culprit, board.values())))
        causes = {rank: entry["note"] for rank, entry in board.items() if entry.get("is_cause")}
        words = [f'{self._named(rank)} ended with "{note}"' for rank, note in causes.items()]
        silent = [rank for rank, entry in board.items() if _is_culprit(entry) and "note" not in entry]
        if silent:
            has, its = ("has", "its") if len(silent) == 1 else ("have", "their")
            known = {board[rank].get("gone") or _standing(board[rank]) for rank in silent}
            words.append(
                f"{_listed([self._named(rank) for rank in silent])} {has} not said why ({'; '.join(known)}): "
                f"look at the end of {its} log, and whether process and host are alive"
            )
        told = "; ".join(words) or "no rank names a cause: look at the network between their hosts"
        return told[0].upper() + told[1:]

    def _named(self, rank: int) -> str:
        return f"rank {rank} (host {self.hosts[rank]})"

    def _board(self, until: Callable[[dict[int, dict[str, Any]]], bool]) -> dict[int, dict[str, Any]]:
        """What the guardians know of the other ranks, once it suffices or `_NOTES_WAIT_S` are over."""
        if watch.active is None:
            return {}
        deadline = time.monotonic() + _NOTES_WAIT_S
        while not until(self._others()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._others()

    def _others(self) -> dict[int, dict[str, Any]]:
        board = dict(watch.active.board) if watch.active is not None else {}
        return {rank: entry for rank, entry in sorted(board.items()) if rank != self.rank}


def _standing(entry: dict[str, Any]) -> str:
    return f"still in {entry['stands']}" if entry.get("stands") else "no sign of life"


def _died(entry: dict[str, Any]) -> bool:
    return "gone" in entry and "note" not in entry


def _is_culprit(entry: dict[str, Any]) -> bool:
    """Whether a rank's entry on the board shows a cause: its own failure, or silence before it said anything."""
    troubled = entry.get("silent") or entry.get("unheard") or entry.get("stands") or "gone" in entry
    return bool(entry.get("is_cause") or (troubled and "note" not in entry))


def leave(code: int) -> NoReturn:
    """Ends the process without exit handlers, which might wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _in_traceback(error: BaseException) -> tuple[str, Sequence[int]]:
    """Name and ranks of the torch.distributed call that raised an exception; all ranks if there is none."""
    name, group = "a collective over ranks", None
    inside = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        of_torch = "torch/distributed/" in frame.f_code.co_filename.replace(os.sep, "/")
        if of_torch and not inside and frame.f_code.co_name != "wrapper":
            inside, group = True, frame.f_locals.get("group")
            name = f"{frame.f_code.co_name.strip('_')} over ranks"
        elif not of_torch:
            inside = False
    ranks = dist.get_process_group_ranks(group if isinstance(group, dist.ProcessGroup) else None)
    return name, ranks


def _describe(collective: FailedCollective) -> str:
    return f"{collective.name} {_spans(collective.ranks)} failed: {collective.reason}"


def _spans(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}–{ranks[-1]}"
    return _listed([str(rank) for rank in ranks])


def _listed(items: Sequence[str], shown: int = 8) -> str:
    rest = f", … ({len(items)} in all)" if len(items) > shown else ""
    return ", ".join(items[:shown]) + rest


def _remedy(reason: str) -> str:
    resume = "start the job again with --load (or --auto-resume) to go on from the last checkpoint"
    if re.search(r"timed out|timeout", reason, re.IGNORECASE):
        return f"If a rank was only slow, raise --distributed-timeout-minutes; otherwise {resume}"
    return resume[0].upper() + resume[1:]
