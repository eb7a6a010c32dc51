"""Reads text files, plain or compressed: the files of a directory, the lines of a file, a file as one document.

A file's first bytes say whether it is compressed; its name does not matter. A byte-order mark at the start of a file
does not belong to the text.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scmoe_ds.errors import DataError

TEXT_ENDING = ".txt"
ENDINGS = (".jsonl", ".json", TEXT_ENDING)
COMPRESSED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_BYTES = 1 << 30
"""The longest line, and the longest text file. An index cannot hold a document of 2³¹ tokens."""
STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading an opened file may raise: the disk fails, or a compressed stream is damaged or ends too early."""


class BadDocumentError(DataError):
    """One document cannot be used; the others of its file can."""


@dataclass(frozen=True)
class Found:
    """The files of a directory, sorted by path: those to read, and those left out (name and reason)."""

    files: list[Path]
    left_out: list[str]


def is_text(path: Path, endings: Sequence[str] = ()) -> bool:
    """Whether a file is one document, by its name: .txt, or one of ``endings``. Others hold JSON lines."""
    return _uncompressed(path).lower().endswith((TEXT_ENDING, *endings))


def find_files(directory: Path, endings: Sequence[str] = ()) -> Found:
    """All .jsonl, .json and .txt files, and those of ``endings``, at any depth, compressed or not, in any case.

    Files and directories whose name begins with a dot are left out: editors and file managers leave copies there.

    Raises:
        DataError: a directory cannot be read.
    """
    endings = (*ENDINGS, *endings)

    def stop(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}.")

    found = Found([], [])
    for parent, children, names in os.walk(directory, onerror=stop):
        links = [child for child in children if os.path.islink(os.path.join(parent, child))]
        concealed = [child for child in children if child.startswith(".") and child not in links]
        children[:] = [child for child in children if child not in concealed]
        present = set(names)
        for name in [*names, *links, *concealed]:
            path = Path(parent, name)
            plain = _uncompressed(path)
            if name in links:
                found.left_out.append(f"{path} (a link to a directory)")
            elif name.startswith("."):
                found.left_out.append(f"{path} (hidden)")
            elif not plain.lower().endswith(endings):
                found.left_out.append(str(path))
            elif not path.is_file():
                found.left_out.append(f"{path} (a link to nothing)")
            elif plain != name and plain in present:
                found.left_out.append(f"{path} ({plain} is there too)")
            else:
                found.files.append(path)
    return Found(sorted(found.files), sorted(found.left_out))


@contextmanager
def open_stream(path: str | Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed if it is compressed. Reading them may raise STREAM_ERRORS.

    Raises:
        OSError: the file cannot be opened.
        DataError: the file is zstd, and no package reads that.
    """
    with open(path, "rb") as file:
        decompressed = _format(file.peek(8))
        with decompressed(file, path) if decompressed else nullcontext(file) as stream:
            yield stream


def is_compressed(path: str | Path) -> bool:
    """Whether ``open_stream`` decompresses a file."""
    with open(path, "rb") as file:
        return _format(file.read(8)) is not None


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, which begin at 1. Line ends are included. Raises a DataError if the file
    or its compressed stream cannot be read, or a line is too long; names file and line."""
    number = 0
    try:
        with open_stream(path) as stream:
            while line := stream.readline(MOST_BYTES + 1):
                number += 1
                if len(line) > MOST_BYTES:
                    raise DataError(f"{path}, line {number}: longer than {MOST_BYTES >> 20} MiB. Divide the document.")
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except STREAM_ERRORS as error:
        if isinstance(error, OSError) and error.filename is not None:  # it could not be opened
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        raise DataError(f"{path}, line {number + 1}: cannot be read ({_words(error)}). Copy the file again.") from error


def read_document(path: str | Path) -> str:
    """A text file as one document.

    Raises:
        BadDocumentError: not UTF-8.
        DataError: as ``read_lines``, or more than MOST_BYTES.
    """
    content = io.BytesIO()
    for _, line in read_lines(path):
        if content.tell() + len(line) > MOST_BYTES:
            raise DataError(f"{path} is longer than {MOST_BYTES >> 20} MiB, and one document. Divide it.")
        content.write(line)
    octets = content.getvalue()
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError as error:
        line_number = octets.count(b"\n", 0, error.start) + 1
        raise BadDocumentError(
            f"{path} is not UTF-8 (byte {error.start}) in line {line_number}. "
            f"Convert it, e.g. with iconv -f {_likely_encoding(octets)} -t UTF-8."
        ) from error


def parse_line(path: str | Path, number: int, line: bytes, keys: Sequence[str]) -> dict[str, str]:
    """The texts of a line that is a JSON object. Raises a BadDocumentError if the line is no JSON object, lacks a key,
    or a value is no text; names file and line."""
    where = f"{path}, line {number}"
    record = _parse_json(where, line)
    if not isinstance(record, dict):
        remedy = " Write one object a line, as jq -c '.[]' does." if isinstance(record, list) else ""
        raise BadDocumentError(f"{where}: a JSON {type(record).__name__}, but each line must be a JSON object.{remedy}")
    texts = {}
    for key in keys:
        if key not in record:
            raise BadDocumentError(
                f"{where}: no key {key!r}; the line has {', '.join(map(repr, record)) or 'none'}. "
                "Name the keys that hold text with --json-keys."
            )
        text = record[key]
        if not isinstance(text, str):
            raise BadDocumentError(f"{where}: {key!r} is of type {type(text).__name__}, not a string.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadDocumentError(
                f"{where}: {key!r} has half of a surrogate pair at character {error.start}. Repair the escape sequence."
            ) from error
        texts[key] = text
    return texts


def _parse_json(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file.") from error
    except json.JSONDecodeError as error:
        if (opened := line.strip()) in (b"[", b"{"):
            raise BadDocumentError(
                f"{where}: a JSON value over several lines, but each line must be one JSON object. "
                f"Write one object a line, as jq -c '{'.[]' if opened == b'[' else '.'}' does."
            ) from error
        raise BadDocumentError(
            f"{where}: not JSON ({error.msg} at column {error.colno}). Each line must be one JSON object; "
            "name plain text files .txt."
        ) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadDocumentError(f"{where}: a number is too long ({error}). Remove it, or make it a string.") from error
    except RecursionError as error:
        raise BadDocumentError(f"{where}: nested more deeply than can be read. Remove the value.") from error


def _likely_encoding(octets: bytes) -> str:
    """For the remedy: what writes text that is not UTF-8. Windows programs mark UTF-16; the rest is mostly Latin-1."""
    return "UTF-16" if octets.startswith((b"\xff\xfe", b"\xfe\xff")) else "LATIN1"


def _uncompressed(path: Path) -> str:
    """A file's name without the ending of a compression."""
    return path.stem if path.suffix.lower() in COMPRESSED_ENDINGS else path.name


def _format(head: bytes) -> Callable[[BinaryIO, str | Path], Any] | None:
    """What decompresses a file that starts with these bytes; None for plain text."""
    return next((decompressed for start, decompressed in _FORMATS.items() if re.match(start, head)), None)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------- compressed streams


def _zstd(file: BinaryIO, path: str | Path) -> Any:
    try:
        new: Callable[[], Any] = importlib.import_module("compression.zstd").ZstdDecompressor  # from Python 3.14 on
    except ImportError:
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:
            raise DataError(
                f"{path} is compressed with zstd, which this Python does not read: pip install zstandard, or "
                "decompress the file with `zstd -d`."
            ) from None
        new = lambda: zstandard.ZstdDecompressor().decompressobj()  # noqa: E731
    return io.BufferedReader(_ZstdFrames(file, new))


class _ZstdFrames(io.RawIOBase):
    """All frames of a zstd file. A file that ends within a frame is an error; zstandard's own reader accepts it."""

    _BLOCK_BYTES = 1 << 14  # of compressed bytes, whose text is in memory at once

    def __init__(self, file: BinaryIO, new_decoder: Callable[[], Any]) -> None:
        self._file, self._new_decoder = file, new_decoder
        self._decoder: Any = None
        self._compressed, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            block = self._compressed or self._file.read(self._BLOCK_BYTES)
            if not block:
                if self._decoder is not None:
                    raise EOFError("the zstd stream is truncated")
                return 0
            self._decoder = self._decoder or self._new_decoder()
            try:
                self._text, self._compressed = memoryview(self._decoder.decompress(block)), b""
            except Exception as error:  # each package has a class of its own
                raise OSError(f"the zstd stream is damaged: {error}") from error
            if self._decoder.eof:
                self._compressed, self._decoder = self._decoder.unused_data, None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


_FORMATS: dict[bytes, Callable[[BinaryIO, str | Path], Any]] = {
    rb"\x1f\x8b": lambda file, _: gzip.GzipFile(fileobj=file),
    rb"BZh[1-9](1AY|\x17rE)": lambda file, _: bz2.BZ2File(file),
    rb"\xfd7zXZ\x00": lambda file, _: lzma.LZMAFile(file),  # noqa: SIM115
    rb"\x28\xb5\x2f\xfd": _zstd,
}
