"""Threads that do what others need not wait for, the most urgent first, each with memory of its own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from queue import PriorityQueue, SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from scmoe_ds.compat import before_threads_are_joined

Memory = TypeVar("Memory")

_program_ends = threading.Event()
before_threads_are_joined(_program_ends.set)


@dataclass
class Arriving:
    """An expert that a room brings; an `Arrival`."""

    future: Future[torch.cuda.Event | None]

    def wait(self) -> None:
        event = self.future.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def tell(self, task: Future[Any]) -> None:
        """The task that brings it is over: if it has failed before the arrival, whoever waits has to know."""
        if not self.future.done():
            self.future.set_exception(CancelledError() if task.cancelled() else task.exception())


def has_succeeded(task: Future[Any]) -> bool:
    """Whether a task is over, without an error."""
    return task.done() and not task.cancelled() and task.exception() is None


class Workers(Generic[Memory]):
    """A thread for each memory.

    Args:
        memories: a task gets one that no other task has at that time.
        device: a GPU's memories have a stream each, which is current for the task.
    """

    def __init__(self, memories: Sequence[Memory], device: torch.device) -> None:
        self._number = itertools.count()
        self._tasks: PriorityQueue[tuple[int, int, Future[Any], Callable[[Memory], Any]]] = PriorityQueue()
        self._idle: SimpleQueue[tuple[Memory, torch.cuda.Stream | None]] = SimpleQueue()
        for memory in memories:
            self._idle.put((memory, torch.cuda.Stream(device) if device.type == "cuda" else None))
        self._pool = ThreadPoolExecutor(len(memories), "experts")

    def submit(self, urgency: int, task: Callable[[Memory], Any]) -> Future[Any]:
        """Hands a task to the next free thread. Tasks of the same urgency begin in the order of the calls. When the
        program ends, those that have not begun are cancelled.

        Args:
            urgency: 0 goes first.
            task: without gradients.
        """
        future: Future[Any] = Future()
        self._tasks.put((urgency, next(self._number), future, task))
        self._pool.submit(self._do_one)
        return future

    def _do_one(self) -> None:
        """The most urgent task."""
        _, _, future, task = self._tasks.get()
        if _program_ends.is_set():
            future.cancel()
            return
        memory, stream = self._idle.get()
        try:
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                future.set_result(task(memory))
        except BaseException as error:  # of whatever kind, it belongs to whoever waits
            future.set_exception(error)
        finally:
            self._idle.put((memory, stream))
