"""Files as a place to read tensors from, past the page cache.

A file is not mapped into memory: a mapping counts as resident, and a file that is cut short ends a process that reads
its mapping. Reading directly (O_DIRECT) leaves the processor to the computation; a file system without it is read the
ordinary way.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from scmoe_ds.errors import CheckpointError
from scmoe_ds.offload.readers import PAGE_BYTES


class ExpertFileError(CheckpointError):
    """An expert that cannot be read from its file."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `nbytes` from byte `offset` on, contiguous."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype


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
        return os.open(self._path, os.O_RDONLY | self._direct)

    def read(self, offset: int, needed: int, buffer: memoryview) -> None:
        """Fills the first `needed` bytes and perhaps more; offset and buffer begin at a page.

        Raises:
            ExpertFileError: it cannot be read, or ends too early.
        """
        whole, got = -(-needed // PAGE_BYTES) * PAGE_BYTES, 0
        descriptor = self._descriptor
        while got < needed:
            try:
                count = os.preadv(descriptor, [buffer[got:whole]], offset + got)
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
