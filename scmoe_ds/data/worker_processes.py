"""Maps a function over items in several processes, keeps the order of the items, and notices killed processes.

Only the worker holds the other end of its pipe, so its death closes the pipe at any moment. multiprocessing.Pool and
ProcessPoolExecutor wait for ever for the rest of a half-sent result.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from scmoe_ds.errors import DataError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end."""
_CHUNK_ITEMS, _CHUNK_BYTES = 32, 1 << 22
_AHEAD_PER_WORKER = 4  # chunks; bounds the memory

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(
    function: Callable[[T], R], items: Iterator[T], workers: int, size: Callable[[T], int]
) -> Generator[R | Exception, None, None]:
    """The function's result or exception for each item. With 1 worker this process does the work.

    Args:
        size: of an item in bytes; a worker gets a large item alone.

    Raises:
        DataError: a worker was killed.
    """
    if workers == 1:
        yield from (_outcome(function, item) for item in items)
        return
    processes, idle = [], []
    for _ in range(workers):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_work, args=(there, function), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        idle.append(here)
    try:
        yield from _in_order(_chunks(items, size), idle, _AHEAD_PER_WORKER * workers)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _in_order(chunks: Iterator[list[Any]], idle: list[Connection], ahead: int) -> Iterator[Any]:
    """Results in the order of the chunks. At most ``ahead`` chunks are sent before the first of them is back."""
    sent = returned = 0
    at_work: dict[Connection, int] = {}
    results: dict[int, list[Any]] = {}
    while True:
        while idle and sent < returned + ahead and (chunk := next(chunks, None)):
            with _killed_is_an_error():
                idle[-1].send(chunk)
            at_work[idle.pop()] = sent
            sent += 1
        if not at_work:
            return
        for connection in wait(list(at_work)):
            assert isinstance(connection, Connection)
            with _killed_is_an_error():
                results[at_work.pop(connection)] = connection.recv()
            idle.append(connection)
        while returned in results:
            yield from results.pop(returned)
            returned += 1


@contextmanager
def _killed_is_an_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise DataError(
            "a worker process was killed, most likely because memory ran out (the kernel's log says so). "
            "Run with fewer --workers."
        ) from None


def _chunks(items: Iterator[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups items for the workers."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if len(chunk) == _CHUNK_ITEMS or total >= _CHUNK_BYTES:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """Runs in a worker process."""
    for number in SIGNALS:  # Ctrl-C reaches all processes of a terminal; the parent ends this one
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        connection.send([_outcome(function, item) for item in connection.recv()])


def _end_with_parent() -> None:
    """Ends this worker when its parent was killed and cannot."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _outcome(function: Callable[[T], R], item: T) -> R | Exception:
    try:
        return function(item)
    except Exception as error:
        return error
