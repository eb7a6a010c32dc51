"""Threads that do what others need not wait for, the most urgent first, each with memory of its own."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from queue import PriorityQueue
from typing import Any, Generic, TypeVar

import torch

Memory = TypeVar("Memory")
_Entry = tuple[int, int, "Future[Any] | None", Any]
_LAST = 1 << 30


@dataclass
class Arriving:
    """An expert that a room brings; an `Arrival`."""

    future: Future[torch.cuda.Event | None]

    def wait(self) -> None:
        event = self.future.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


class Workers(Generic[Memory]):
    """As many threads as memories; they end with this object.

    Args:
        memories: of each thread: a task gets that of the thread that it runs on.
        device: a GPU's threads have a stream of their own each, which is current for the tasks.
    """

    def __init__(self, memories: Sequence[Memory], device: torch.device) -> None:
        self._tasks: PriorityQueue[_Entry] = PriorityQueue()
        self._number = itertools.count()
        for number, memory in enumerate(memories):
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            arguments = self._tasks, memory, stream
            threading.Thread(target=_work, args=arguments, name=f"experts {number}", daemon=True).start()
        weakref.finalize(self, _stop, self._tasks, len(memories))

    def submit(self, urgency: int, task: Callable[[Memory], Any], future: Future[Any] | None = None) -> Future[Any]:
        """Has a task done; those of the same urgency begin in the order of the calls.

        Args:
            urgency: 0 goes first.
            task: without gradients.
            future: of the result, which the task may set itself before it ends; None: a new one.
        """
        future = future or Future()
        self._tasks.put((urgency, next(self._number), future, task))
        return future


def _work(tasks: PriorityQueue[_Entry], memory: Any, stream: torch.cuda.Stream | None) -> None:
    while True:
        _, _, future, task = tasks.get()
        if future is None:
            return
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                result = task(memory)
            if not future.done():
                future.set_result(result)
        except BaseException as error:  # of whatever kind, it belongs to whoever waits
            if not future.done():
                future.set_exception(error)
        del future, task


def _stop(tasks: PriorityQueue[_Entry], threads: int) -> None:
    for number in range(threads):
        tasks.put((_LAST, number, None, None))
