"""Files that survive an interruption: written whole, flushed to the disk, and known by size and checksum."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

_BLOCK_BYTES = 1 << 22


class FileEntry(TypedDict):
    """A file's entry in a manifest."""

    bytes: int
    crc32: str


def checksum(path: Path) -> str:
    """CRC-32 of a file as eight hexadecimal digits. It finds every flipped bit and is as fast as memory."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def file_entry(path: Path) -> FileEntry:
    """Size and checksum of a file."""
    return {"bytes": path.stat().st_size, "crc32": checksum(path)}


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields a temporary path. At the end its file replaces ``path``."""
    staged = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # other processes may write theirs at this moment
    try:
        yield staged
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that, whenever the machine stops, it has its old content or its new one."""
    with replaced(path) as staged:
        staged.write_text(text, encoding="utf-8")
        flush(staged)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no fsync
            raise
    finally:
        os.close(descriptor)


def try_to_write(directory: str | os.PathLike[str], num_bytes: int = 0) -> None:
    """Writes a temporary file into a directory. Raises an OSError if that fails."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(num_bytes))
