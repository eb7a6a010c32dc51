"""Size and checksum of a file, for the manifests of checkpoints and the records of caches."""

from __future__ import annotations

import zlib
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
