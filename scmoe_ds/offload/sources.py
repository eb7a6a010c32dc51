"""Slower tiers that routed experts are read from: files, or pinned host memory beside a GPU.

A source copies one expert into tensors that it is given and returns at once; what it returns waits for the copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, Protocol

import torch
from torch import Tensor

from scmoe_ds.offload.files import ExpertFile, Extent
from scmoe_ds.offload.pages import PAGE_BYTES, whole_pages
from scmoe_ds.offload.pinned import PinnedTensors
from scmoe_ds.offload.readers import Arrival, BufferedReader, Copied, Reader
from scmoe_ds.trace.migrations import MigrationWatch

PIECE_BYTES = (4 << 20) - 3 * PAGE_BYTES
"""What one reader reads at a time: enough for a disk's full rate, little enough that readers share an expert. With the
pages around it, it fills a buffer of a power of two, which pinned memory is rounded up to."""

SMALL_BYTES = 16 << 10
"""Up to which a tensor is kept in memory: biases, about a thousandth of an expert."""


class WholeTensors(Protocol):
    """Where tensors are read from, one at a time, such as a checkpoint."""

    def shape(self, name: str) -> Sequence[int]:
        """Of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """A tensor."""


class ExpertSource(Protocol):
    """Where experts are read from, parameter by parameter."""

    tier: Literal["host", "disk"]

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        """Copies whole parameters.

        Args:
            into: by its global name, the contiguous tensor that each parameter is copied into.
            after: what must have ended before the tensors may be written; None: nothing.
            watch: is told when the copies begin and end.

        Returns:
            at once; `wait` orders the current stream (on a CPU: the host) behind the copies.
        """


class HostExperts:
    """Experts in pinned host memory, copied to a GPU on a stream of their own.

    Experts of a narrower dtype than the model's are converted as they arrive: bf16 experts that are computed in fp32
    take half the memory, and migrate in half the time.

    Args:
        weights: the whole parameters; those of `names` are read now.
        names: global names of this rank's routed experts.
        dtype: of the model.
        device: the GPU.

    Raises:
        ArgumentError: the system does not give enough pinned memory.
    """

    tier: Literal["host", "disk"] = "host"

    def __init__(self, weights: WholeTensors, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
        sizes = [math.prod(weights.shape(name)) * dtype.itemsize for name in names]
        remedy = "read experts from files with --expert-tier disk, or spread them over more expert-parallel ranks"
        memory, self._tensors = PinnedTensors(sizes, "--expert-tier host", remedy), {}
        for name in names:
            value = weights.read(name)
            self._tensors[name] = memory.keep(value, min(value.dtype, dtype, key=lambda each: each.itemsize))
        self._reader = Reader(device)

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        return self._reader.copy([(tensor, self._tensors[name]) for name, tensor in into.items()], after, watch)


class DiskExperts:
    """Experts in files, read past the page cache by threads, of a reader each.

    A tensor comes in one of three ways:

        straight    on a CPU, to where it is needed, if file and memory agree in dtype and begin and end at pages.
                    Tensors that lie side by side are one read.
        kept        on a CPU, a small tensor that is not whole pages (a bias) stays in memory
        buffered    all else, piece by piece through a reader's buffer; converted if the model has another dtype

    Args:
        extents: of each parameter of this rank's routed experts, by its global name.
        remedy: for errors: what gives the files anew.
        device: of the tensors that are filled.
        readers: that read at the same time.

    Raises:
        ExpertFileError: a file that cannot be opened or read.
        ArgumentError: the system does not give enough pinned memory.
    """

    tier: Literal["host", "disk"] = "disk"

    def __init__(self, extents: Mapping[str, Extent], remedy: str, device: torch.device, readers: int = 2) -> None:
        self._extents, self._readers, self._small = extents, readers, dict[str, Tensor]()
        self._files = {file: ExpertFile(file, remedy) for file in {extent.file for extent in extents.values()}}
        self._idle: SimpleQueue[BufferedReader] = SimpleQueue()
        for number in range(readers):
            self._idle.put(BufferedReader(device, number, PIECE_BYTES + 2 * PAGE_BYTES))
        self._pool = ThreadPoolExecutor(readers, "expert-reader")
        for name, extent in extents.items() if device.type == "cpu" else ():
            if extent.nbytes <= SMALL_BYTES and not extent.on_pages:
                self._small[name] = torch.empty(extent.nbytes // extent.dtype.itemsize, dtype=extent.dtype)
                self._read_piece(extent, 0, self._small[name], None, None)

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        straight = {name for name, tensor in into.items() if self._reads_straight(self._extents[name], tensor)}
        small = [(into[name].view(-1), self._small[name]) for name in into if name in self._small]
        pieces = []
        for run in self._runs({name: into[name] for name in straight}) or [Run()] * bool(small):
            pieces.append(self._pool.submit(self._read_run, run, small, after, watch))
            small = []
        for name in into.keys() - straight - self._small.keys():
            extent, elements = self._extents[name], into[name].view(-1)
            assert elements.numel() * extent.dtype.itemsize == extent.nbytes, name
            for start in range(0, extent.nbytes, PIECE_BYTES):
                first, end = (octet // extent.dtype.itemsize for octet in (start, start + PIECE_BYTES))
                pieces.append(self._pool.submit(self._read_piece, extent, start, elements[first:end], after, watch))
        return _FromFile(pieces)

    def _reads_straight(self, extent: Extent, tensor: Tensor) -> bool:
        on_page = tensor.device.type == "cpu" and tensor.data_ptr() % PAGE_BYTES == 0
        return on_page and extent.on_pages and extent.dtype == tensor.dtype

    def _runs(self, into: Mapping[str, Tensor]) -> list[Run]:
        """Tensors side by side in a file, about as many bytes for each reader: few long reads are the fastest."""
        runs: list[Run] = []
        most = sum(tensor.nbytes for tensor in into.values()) / self._readers
        for name in sorted(into, key=lambda name: (self._extents[name].file, self._extents[name].offset)):
            extent = self._extents[name]
            if not runs or runs[-1].end != (extent.file, extent.offset) or runs[-1].nbytes >= most:
                runs.append(Run(extent.file, extent.offset))
            runs[-1].add(into[name])
        return runs

    def _read_run(
        self, run: Run, copied: Sequence[tuple[Tensor, Tensor]], after: Arrival | None, watch: MigrationWatch | None
    ) -> Copied:
        """Straight to where it is needed, on a thread of the pool."""
        reader = self._idle.get()
        try:
            return reader.read_straight(lambda: self._fill_run(run), run.nbytes, copied, after, watch)
        finally:
            self._idle.put(reader)

    def _read_piece(
        self, extent: Extent, start: int, into: Tensor, after: Arrival | None, watch: MigrationWatch | None
    ) -> Copied:
        """Through a buffer, on a thread of the pool."""
        reader = self._idle.get()
        try:
            fill = partial(self._fill, extent, start, into.numel() * extent.dtype.itemsize)
            return reader.read(fill, extent.dtype, into, after, watch)
        finally:
            self._idle.put(reader)

    def _fill(self, extent: Extent, start: int, nbytes: int, buffer: Tensor) -> Tensor:
        skipped = (extent.offset + start) % PAGE_BYTES
        pages = buffer[: whole_pages(skipped + nbytes)].numpy().data
        self._files[extent.file].read(extent.offset + start - skipped, skipped + nbytes, [pages])
        return buffer[skipped : skipped + nbytes]

    def _fill_run(self, run: Run) -> None:
        if run.file is not None:
            self._files[run.file].read(run.offset, run.nbytes, run.buffers)


@dataclass
class Run:
    """Tensors that lie side by side in a file, and the memory that each is read to; or none."""

    file: Path | None = None
    offset: int = 0
    nbytes: int = 0
    buffers: list[memoryview] = field(default_factory=list)

    @property
    def end(self) -> tuple[Path | None, int]:
        """Where the next tensor would lie."""
        return self.file, self.offset + self.nbytes

    def add(self, tensor: Tensor) -> None:
        """The next tensor's memory, whole pages."""
        self.nbytes += tensor.nbytes
        self.buffers.append(tensor.view(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _FromFile:
    pieces: Sequence[Future[Copied]]

    def wait(self) -> None:
        """The host waits for the disk, the current stream for the copies."""
        for piece in self.pieces:
            piece.result().wait()
