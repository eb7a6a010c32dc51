"""tqdm's bar below the log's lines, where a person looks on: on rank 0, when stderr is a terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist
from tqdm import tqdm


class Progress:
    """A context in which a bar counts iterations. Whatever is printed or logged meanwhile stands above the bar, whole.

    Args:
        iteration: where the run stands.
        train_iters: where it ends.
        terminal: where the bar is drawn; default: stderr. None of it happens if that is no terminal.
    """

    def __init__(self, iteration: int, train_iters: int, terminal: TextIO | None = None) -> None:
        self._iteration, self._train_iters = iteration, train_iters
        self._terminal = sys.stderr if terminal is None else terminal
        self._bar: tqdm[Any] | None = None
        self._streams: tuple[TextIO, TextIO] = sys.stdout, sys.stderr
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> Progress:
        if dist.get_rank() != 0 or not self._terminal.isatty() or self._iteration >= self._train_iters:
            return self
        self._bar = tqdm(
            total=self._train_iters,
            initial=self._iteration,
            unit="step",
            file=self._terminal,
            leave=False,
            dynamic_ncols=True,
        )
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (self._above(stream) for stream in self._streams)
        # Handlers keep the stream that was there when they were made.
        loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                before = handler.stream
                with suppress(AttributeError):  # a handler that always takes sys.stderr as it is
                    handler.setStream(self._above(before))
                    self._handlers.append((handler, before))
        return self

    def update(self) -> None:
        """One more iteration is done."""
        if self._bar is not None:
            self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        for stream in (sys.stdout, sys.stderr, *(handler.stream for handler, _ in self._handlers)):
            if isinstance(stream, _AboveBar):
                stream.finish()
        sys.stdout, sys.stderr = self._streams
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._bar.close()
        self._bar = None

    def _above(self, stream: Any) -> Any:
        # What goes to a file beside the terminal cannot tear the bar.
        with suppress(AttributeError, ValueError):  # no stream, or one that was closed
            if stream.isatty():
                return _AboveBar(stream, self._bar)
        return stream


class _AboveBar:
    """A stream whose whole lines are written where the bar was; the bar is drawn again below them."""

    def __init__(self, stream: Any, bar: Any) -> None:
        self._stream, self._bar, self._rest = stream, bar, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, newline, rest = (self._rest + text).rpartition("\n")
        self._rest = rest
        if newline:
            with self._bar.get_lock(), suppress(OSError):
                self._bar.clear(nolock=True)
                self._stream.write(lines + newline)
                self._stream.flush()
                self._bar.refresh(nolock=True)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def finish(self) -> None:
        """Writes what has no end of line yet."""
        if self._rest:
            self.write("\n")
