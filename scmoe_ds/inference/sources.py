"""Slower tiers that routed experts are read from: a file, or pinned host memory beside a GPU.

A source copies one expert into tensors that it is given and returns at once; what it returns waits for the copy.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.checkpoint.safetensors_files import is_export, shards_of
from scmoe_ds.errors import CheckpointError

PAGE_BYTES = 4096
PIECE_BYTES = 4 << 20
"""What one thread reads at a time: enough for a disk's full rate, little enough that threads share an expert."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ExpertFileError(CheckpointError):
    """An expert that cannot be read from its file."""


class Arrival(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """After it, work that is enqueued on the current stream may read the tensors.

        Raises:
            ExpertFileError: the file did not give what it should.
        """


class ExpertSource(Protocol):
    """Where experts are read from, parameter by parameter."""

    def load(self, into: Mapping[str, Tensor], after: torch.cuda.Event | None) -> Arrival:
        """Copies whole parameters.

        Args:
            into: global name to the tensor that is filled; contiguous.
            after: the last work that reads what the tensors hold now; None: there is none.
        """


class HostExperts:
    """Experts in pinned host memory, copied to a GPU on a stream of their own.

    Args:
        weights: the whole parameters; those of `names` are read now.
        names: global names of this rank's routed experts.
        dtype: of the model.
        device: the GPU.
    """

    def __init__(self, weights: Weights, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = {name: weights.read(name).to(dtype).contiguous().pin_memory() for name in names}
        self._stream = torch.cuda.Stream(device)

    def load(self, into: Mapping[str, Tensor], after: torch.cuda.Event | None) -> Arrival:
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            for name, tensor in into.items():
                tensor.copy_(self._tensors[name], non_blocking=True)
            return _OnStream(self._stream.record_event())


@dataclass(frozen=True)
class _OnStream:
    copied: torch.cuda.Event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.copied)


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class DiskExperts:
    """Experts in the files of an export (safetensors), read by threads past the page cache.

    The file is not mapped into memory: a mapping counts as resident, and a file that is cut short ends a process that
    reads its mapping. Reading directly (O_DIRECT) leaves the processor to the computation; a file system without it
    is read the ordinary way.

    An export may be of another dtype than the model, and is converted as it arrives: bf16 experts that are computed in
    fp32 migrate in half the time.

    Args:
        path: of an export of scmoe convert.
        names: global names of this rank's routed experts.
        threads: that read at the same time: one fills a buffer while another's is copied.

    Raises:
        CheckpointError: not an export, or one without one of the names.
        ExpertFileError: a file that is missing or too short.
    """

    def __init__(self, path: Path, names: Sequence[str], threads: int = 2) -> None:
        if not is_export(path):
            raise CheckpointError(
                f"--load {path}: experts can only be read from files of an export; make one with "
                f"scmoe convert export {path} OUT"
            )
        self._places = _places(path, names)
        self._files = {place.file: _File(place.file) for place in self._places.values()}
        self._pool = ThreadPoolExecutor(threads, "expert-reader")
        self._own = threading.local()

    def load(self, into: Mapping[str, Tensor], after: torch.cuda.Event | None) -> Arrival:
        pieces = []
        for name, tensor in into.items():
            place, elements = self._places[name], tensor.view(-1)
            assert elements.numel() * place.dtype.itemsize == place.nbytes, name
            for start in range(0, place.nbytes, PIECE_BYTES):
                first, end = (octet // place.dtype.itemsize for octet in (start, start + PIECE_BYTES))
                part = elements[first:end]
                pieces.append(self._pool.submit(self._read, place, start, part, after))
        return _FromFile(pieces)

    def _read(self, place: _Place, start: int, into: Tensor, after: torch.cuda.Event | None) -> None:
        """One piece, on a thread of the pool: through a buffer of whole pages, which direct reads need."""
        buffer = getattr(self._own, "buffer", None)
        if buffer is None:
            # Memory of its own mapping starts at a page.
            buffer = torch.frombuffer(mmap.mmap(-1, PIECE_BYTES + 2 * PAGE_BYTES), dtype=torch.uint8)
            self._own.buffer = buffer = buffer.pin_memory() if into.is_cuda else buffer
        skipped = (place.offset + start) % PAGE_BYTES
        needed = skipped + into.numel() * place.dtype.itemsize
        self._files[place.file].read(place.offset + start - skipped, needed, buffer.numpy().data)
        with torch.inference_mode():
            if after is not None:
                after.synchronize()
            # Blocks, also from pinned memory: the buffer is used again.
            into.copy_(buffer[skipped:needed].view(place.dtype))


@dataclass(frozen=True)
class _FromFile:
    pieces: Sequence[Future[None]]

    def wait(self) -> None:
        for piece in self.pieces:
            piece.result()


class _File:
    """A file of an export, open for direct reading where that is possible."""

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
        """Fills the first `needed` bytes and perhaps more; offset and buffer begin at a page."""
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


def _places(path: Path, names: Sequence[str]) -> dict[str, _Place]:
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
            found[name] = _Place(file, 8 + length + first, end - first, dtype, tuple(header[name]["shape"]))
    missing = sorted(set(names) - found.keys())
    if missing:
        raise CheckpointError(f"--load {path} has no {missing[0]} (and {len(missing) - 1} other experts' parameters)")
    return found
