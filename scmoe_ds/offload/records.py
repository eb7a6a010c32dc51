"""Records in sections, in host memory or in a file: where trained experts and their optimizer states stay.

A section begins at a page and is read and written as a whole, past the page cache where the file system allows that
(O_DIRECT). The file has no name in its directory, so that a run that is killed leaves nothing behind.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from queue import SimpleQueue
from typing import Literal, Protocol

import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError, reason_of
from scmoe_ds.offload.pages import PAGE_BYTES, page_aligned, whole_pages
from scmoe_ds.offload.pinned import PinnedTensors, pinned_pages


class Records(Protocol):
    """What keeps the records.

    Attributes:
        nbytes: that it takes.
    """

    tier: Literal["host", "disk"]
    nbytes: int

    def read(self, record: int, section: int, into: Tensor) -> Future[None] | None:
        """Starts to fill a `page_tensor` with a section, behind what the current stream does.

        Returns:
            what the host has to wait for; None: the current stream goes on behind it.
        """

    def write(self, record: int, section: int, value: Tensor) -> Future[None] | None:
        """Starts to put a `page_tensor` into a section; the rest as for `read`."""


class HostRecords:
    """Records in host memory, pinned beside a GPU.

    Args:
        records: bytes of the sections of each; 0: there is none.
        device: of the tensors that are filled.
    """

    tier: Literal["host", "disk"] = "host"

    def __init__(self, records: Sequence[Sequence[int]], device: torch.device) -> None:
        sizes = [nbytes for sections in records for nbytes in sections]
        self.nbytes = sum(sizes)
        self._memory: list[list[Tensor]]
        if device.type == "cuda":
            remedy = 'set scmoe.offload_experts.device to "nvme", or spread the experts over more ranks'
            room = PinnedTensors(sizes, 'scmoe.offload_experts.device = "cpu"', remedy)
            zeros = {nbytes: torch.zeros(nbytes, dtype=torch.uint8) for nbytes in set(sizes)}
            self._memory = [[room.keep(zeros[nbytes], torch.uint8) for nbytes in sections] for sections in records]
        else:
            self._memory = [[torch.empty(nbytes, dtype=torch.uint8) for nbytes in sections] for sections in records]

    def read(self, record: int, section: int, into: Tensor) -> None:
        memory = self._memory[record][section]
        into.copy_(memory[: into.nbytes].view(into.dtype), non_blocking=True)

    def write(self, record: int, section: int, value: Tensor) -> None:
        memory = self._memory[record][section]
        memory[: value.nbytes].view(value.dtype).copy_(value, non_blocking=True)


class FileRecords:
    """Records in a file.

    Args:
        directory: where it lies.
        records, device: as for `HostRecords`.
        threads: that read and write at the same time.

    Raises:
        ArgumentError: no file can be made there, or none of that size.
    """

    tier: Literal["host", "disk"] = "disk"

    def __init__(
        self, directory: str, records: Sequence[Sequence[int]], device: torch.device, threads: int = 4
    ) -> None:
        self._directory = directory
        self._starts: list[list[int]] = []
        self.nbytes = 0
        for sections in records:
            self._starts.append([self.nbytes + each for each in accumulate(map(whole_pages, sections), initial=0)])
            self.nbytes = self._starts[-1].pop()
        self._descriptor = self._made(self.nbytes)
        self._pool = ThreadPoolExecutor(threads, "expert-records")
        self._bounces: SimpleQueue[tuple[Tensor, torch.cuda.Stream]] = SimpleQueue()
        for _ in range(threads if device.type == "cuda" else 0):
            memory = pinned_pages(max(map(max, records)), 'scmoe.offload_experts.device = "nvme"')
            self._bounces.put((memory, torch.cuda.Stream(device)))

    def _made(self, nbytes: int) -> int:
        """The descriptor of a new file. It loses its name before it takes room, so that a run that is killed meanwhile
        leaves nothing behind either. Descriptors are closed with these records."""
        try:
            descriptor, name = tempfile.mkstemp(".experts", dir=self._directory)
            weakref.finalize(self, os.close, descriptor)
            direct = descriptor
            try:
                with suppress(OSError):
                    direct = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
                    weakref.finalize(self, os.close, direct)
            finally:
                os.unlink(name)
            os.posix_fallocate(descriptor, 0, max(nbytes, 1))  # a disk that is too small says so now
        except OSError as error:
            raise self._error(f"{nbytes / 1e9:.2f} GB of experts have no room there", error) from None
        try:
            os.preadv(direct, [page_aligned(PAGE_BYTES).numpy().data], 0)
        except OSError:  # some file systems open a file directly and then refuse to read so
            return descriptor
        return direct

    def read(self, record: int, section: int, into: Tensor) -> Future[None]:
        return self._pool.submit(self._read, self._place(record, section), into, self._so_far(into))

    def write(self, record: int, section: int, value: Tensor) -> Future[None]:
        return self._pool.submit(self._write, self._place(record, section), value, self._so_far(value))

    def _so_far(self, tensor: Tensor) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def _read(self, place: int, into: Tensor, after: torch.cuda.Event | None) -> None:
        if after is None:
            self._transfer(os.preadv, place, into)
            return
        with self._bounced(into.nbytes) as (bounce, stream):
            self._transfer(os.preadv, place, bounce)
            _copy(into, bounce.view(into.dtype), stream, after)

    def _write(self, place: int, value: Tensor, after: torch.cuda.Event | None) -> None:
        if after is None:
            self._transfer(os.pwritev, place, value)
            return
        with self._bounced(value.nbytes) as (bounce, stream):
            _copy(bounce.view(value.dtype), value, stream, after)
            self._transfer(os.pwritev, place, bounce)

    @contextmanager
    def _bounced(self, nbytes: int) -> Iterator[tuple[Tensor, torch.cuda.Stream]]:
        """Pinned memory between file and GPU, and a stream for its copy; there are as many as threads."""
        memory, stream = self._bounces.get()
        try:
            yield memory[:nbytes], stream
        finally:
            self._bounces.put((memory, stream))

    def _place(self, record: int, section: int) -> int:
        return self._starts[record][section]

    def _transfer(self, move: Callable[..., int], offset: int, tensor: Tensor) -> None:
        """All of a tensor, from or to the file."""
        buffer, done = tensor.view(torch.uint8).numpy().data, 0
        while done < len(buffer):
            try:
                count = move(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._error("experts cannot be read or written there", error) from None
            if not count:
                raise self._error("a file of experts has been cut short", OSError())
            done += count

    def _error(self, what: str, error: OSError) -> ArgumentError:
        return ArgumentError(
            f"scmoe.offload_experts.nvme_path = {self._directory!r}: {what} ({reason_of(error)}); name a directory of "
            'this machine with more room, or set device to "cpu"'
        )


def _copy(into: Tensor, value: Tensor, stream: torch.cuda.Stream, after: torch.cuda.Event) -> None:
    """Between pinned memory and the GPU; a thread of the records waits for it, and nobody else."""
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        into.copy_(value, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        copied.record(stream)
    copied.synchronize()
