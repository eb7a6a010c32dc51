"""Where the main thread stands, as other threads of the process see it: how far it has come, and whether a GPU has work
left."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import CodeType

import torch

IN_COLLECTIVE = re.compile(r"torch.distributed|scmoe_ds.comm|agreed|wait_for_all")

streams: list[torch.cuda.Stream] = []
"""In which work may wait for other ranks: this rank's default one, and whoever makes another adds it."""

iteration: int | None = None
reached = "the start"


def reach(place: str, of_iteration: int | None = None) -> None:
    """Notes how far this rank has come, for the message of one that goes no further."""
    global iteration, reached
    reached, iteration = place, iteration if of_iteration is None else of_iteration


class Standing:
    """A thread, mostly the main one, and where it was at the last look."""

    def __init__(self, thread: threading.Thread | None = None) -> None:
        self._thread = thread or threading.main_thread()
        self._stack: list[tuple[CodeType, int, int]] = []

    def has_moved(self) -> bool:
        """Whether it is somewhere else than at the last look."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        before, self._stack = self._stack, []
        while frame is not None:
            self._stack.append((frame.f_code, frame.f_lasti, frame.f_lineno))
            frame = frame.f_back
        return before != self._stack

    @property
    def waits_for_ranks(self) -> bool:
        """Whether it is in a collective, or a GPU has to come to an end before it can go on."""
        return any(IN_COLLECTIVE.search(str(code)) for code, *_ in self._stack) or device_is_busy()

    @property
    def place(self) -> str:
        """The innermost function, and the innermost of this package."""
        if not self._stack:
            return "its end"
        own = next((at for at in self._stack if "scmoe" in at[0].co_filename), self._stack[0])
        places = [f"{code.co_name} ({Path(code.co_filename).name}:{line})" for code, _, line in (own, self._stack[0])]
        return " in ".join(dict.fromkeys(reversed(places)))


def device_is_busy() -> bool:
    """Whether a GPU has not done all that it was given, as when it waits for other ranks. The host does not wait.

    Only streams that were noted are asked. A thread that looks begins on the node's first GPU: what it called the
    default stream would be another rank's GPU, on which it would even take memory.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        return not all(stream.query() for stream in streams)
    except RuntimeError:  # a kernel has failed: the main thread will hear of it
        return False
