"""The files of an export as a place to read single experts from, past the page cache.

A file is not mapped into memory: a mapping counts as resident, and a file that is cut short ends a process that reads
its mapping. Reading directly (O_DIRECT) leaves the processor to the computation; a file system without it is read the
ordinary way.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from scmoe_ds.checkpoint.safetensors_files import is_export, shards_of
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.readers import PAGE_BYTES

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ExpertFileError(CheckpointError):
    """An expert that cannot be read from its file."""


@dataclass(frozen=True)
class Place:
    """Where a parameter lies."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype


class ExpertFile:
    """A file of an export, open for direct reading where that is possible.

    Raises:
        ExpertFileError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
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
        return ExpertFileError(f"{self._path} {what}. Export the checkpoint again, into another directory")


def places(path: Path, names: Sequence[str]) -> dict[str, Place]:
    """Where parameters lie in the files of an export.

    Raises:
        CheckpointError: not an export, or one without one of the names.
        ExpertFileError: a file that is missing or not what it should be.
    """
    if not is_export(path):
        raise CheckpointError(
            f"--load {path}: experts can only be read from files of an export; make one with "
            f"scmoe convert export {path} OUT"
        )
    shards, found, sought = shards_of(path), {}, set(names)
    for file in sorted({shards[name] for name in names if name in shards}):
        try:
            with safe_open(file, framework="pt"):  # checks the header: sizes, types, and offsets that fill the file
                pass
            with file.open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
        except (OSError, ValueError, SafetensorError, struct.error) as error:
            raise ExpertFileError(
                f"{file} is no readable safetensors file ({error}). Export the checkpoint again, into another directory"
            ) from None
        for name in sought & header.keys():
            first, end = header[name]["data_offsets"]
            dtype = _DTYPES.get(header[name]["dtype"])
            if dtype is None:
                raise ExpertFileError(
                    f"{file}: {name} is of type {header[name]['dtype']}, not {', '.join(_DTYPES)}. "
                    "Export the checkpoint again, into another directory"
                )
            found[name] = Place(file, 8 + length + first, end - first, dtype)
    missing = sorted(set(names) - found.keys())
    if missing:
        raise CheckpointError(f"--load {path} has no {missing[0]} (and {len(missing) - 1} other experts' parameters)")
    return found
