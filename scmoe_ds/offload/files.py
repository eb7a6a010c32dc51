"""Files as a place to read tensors from, past the page cache.

A file is not mapped into memory: a mapping counts as resident, and a file that is cut short ends a process that reads
its mapping. Reading directly (O_DIRECT) leaves the processor to the computation; a file system without it is read the
ordinary way.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from scmoe_ds.errors import CheckpointError
from scmoe_ds.offload.pages import PAGE_BYTES


class ExpertFileError(CheckpointError):
    """An expert that cannot be read from its file."""


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in a file: `nbytes` bytes from byte `offset` on."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype

    @property
    def on_pages(self) -> bool:
        """Whether it begins at a page and ends with one."""
        return self.offset % PAGE_BYTES == 0 and self.nbytes % PAGE_BYTES == 0


class ExpertFile:
    """A file, open for direct reading where that is possible.

    Args:
        path: of the file.
        remedy: for errors: what gives the file anew.

    Raises:
        ExpertFileError: it cannot be opened.
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self._path, self._remedy, self._lock = path, remedy, threading.Lock()
        self._direct = getattr(os, "O_DIRECT", 0)
        try:
            self._descriptor = self._open()
        except OSError:
            self._direct = 0
            try:
                self._descriptor = self._open()
            except OSError as error:
                raise self._error(f"cannot be opened ({error.strerror})") from None

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDONLY | self._direct)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def read(self, offset: int, needed: int, buffers: Sequence[memoryview]) -> None:
        """Fills the first `needed` bytes of the buffers, one after another, and perhaps more.

        Args:
            offset: of the first byte in the file; a multiple of `PAGE_BYTES`.
            needed: bytes.
            buffers: each from the start of a page, and of whole pages.

        Raises:
            ExpertFileError: the file cannot be read, or ends too early.
        """
        descriptor, got = self._descriptor, 0
        while got < needed:
            try:
                count = os.preadv(descriptor, _behind(buffers, got), offset + got)
            except OSError as error:
                if error.errno == errno.EINVAL and (other := self._without_direct_reads()) != descriptor:
                    descriptor = other
                    continue
                raise self._error(f"cannot be read at byte {offset + got} ({error.strerror})") from None
            if count == 0:
                raise self._error(f"ends at byte {offset + got}, {needed - got} bytes before the end of an expert")
            got += count

    def _without_direct_reads(self) -> int:
        """The file opened the ordinary way: some file systems open it directly and then refuse to read so.

        Several threads may find that out at the same time.
        """
        with self._lock:
            if self._direct:
                self._direct = 0
                self._descriptor = self._open()
            return self._descriptor

    def _error(self, what: str) -> ExpertFileError:
        return ExpertFileError(f"{self._path} {what}. {self._remedy}")


def _behind(buffers: Sequence[memoryview], skipped: int) -> list[memoryview]:
    """The buffers without their first bytes: a read may give less than was asked for, and goes on there."""
    left = []
    for buffer in buffers:
        if skipped < len(buffer):
            left.append(buffer[skipped:])
        skipped = max(0, skipped - len(buffer))
    return left
