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

from scmoe_ds.offload.files import ExpertFile, Place
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
            into: global name to the tensor that is filled; contiguous.
            after: the last work that reads or writes what the tensors hold now; None: there is none.
            watch: is told when what is copied.
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

    On a CPU a tensor is read straight to where it is needed if file and memory have it in one dtype, from the start of
    a page, in whole pages. What lies side by side is one read. Small tensors that are no whole pages are kept in
    memory. Everything else comes through the readers' buffers, piece by piece, and may be of another dtype than the
    model: it is converted as it arrives.

    Args:
        places: of each parameter of this rank's routed experts, by its global name.
        remedy: for errors: what gives the files anew.
        device: of the tensors that are filled.
        readers: that read at the same time.

    Raises:
        ExpertFileError: a file that cannot be opened or read.
        ArgumentError: the system does not give enough pinned memory.
    """

    tier: Literal["host", "disk"] = "disk"

    def __init__(self, places: Mapping[str, Place], remedy: str, device: torch.device, readers: int = 2) -> None:
        self._places, self._readers, self._small = places, readers, dict[str, Tensor]()
        self._files = {file: ExpertFile(file, remedy) for file in {place.file for place in places.values()}}
        self._idle: SimpleQueue[BufferedReader] = SimpleQueue()
        for number in range(readers):
            self._idle.put(BufferedReader(device, number, PIECE_BYTES + 2 * PAGE_BYTES))
        self._pool = ThreadPoolExecutor(readers, "expert-reader")
        for name, place in places.items() if device.type == "cpu" else ():
            if place.nbytes <= SMALL_BYTES and not place.on_pages:
                self._small[name] = torch.empty(place.nbytes // place.dtype.itemsize, dtype=place.dtype)
                self._read_piece(place, 0, self._small[name], None, None)

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        straight = {name for name, tensor in into.items() if self._reads_straight(self._places[name], tensor)}
        small = [(into[name].view(-1), self._small[name]) for name in into if name in self._small]
        pieces = []
        for run in self._runs({name: into[name] for name in straight}) or [Run()] * bool(small):
            pieces.append(self._pool.submit(self._read_run, run, small, after, watch))
            small = []
        for name in into.keys() - straight - self._small.keys():
            place, elements = self._places[name], into[name].view(-1)
            assert elements.numel() * place.dtype.itemsize == place.nbytes, name
            for start in range(0, place.nbytes, PIECE_BYTES):
                first, end = (octet // place.dtype.itemsize for octet in (start, start + PIECE_BYTES))
                pieces.append(self._pool.submit(self._read_piece, place, start, elements[first:end], after, watch))
        return _FromFile(pieces)

    def _reads_straight(self, place: Place, tensor: Tensor) -> bool:
        on_page = tensor.device.type == "cpu" and tensor.data_ptr() % PAGE_BYTES == 0
        return on_page and place.on_pages and place.dtype == tensor.dtype

    def _runs(self, into: Mapping[str, Tensor]) -> list[Run]:
        """Tensors side by side in a file, about as many bytes for each reader: few long reads are the fastest."""
        runs: list[Run] = []
        most = sum(tensor.nbytes for tensor in into.values()) / self._readers
        for name in sorted(into, key=lambda name: (self._places[name].file, self._places[name].offset)):
            place = self._places[name]
            if not runs or runs[-1].end != (place.file, place.offset) or runs[-1].nbytes >= most:
                runs.append(Run(place.file, place.offset))
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
        self, place: Place, start: int, into: Tensor, after: Arrival | None, watch: MigrationWatch | None
    ) -> Copied:
        """Through a buffer, on a thread of the pool."""
        reader = self._idle.get()
        try:
            fill = partial(self._fill, place, start, into.numel() * place.dtype.itemsize)
            return reader.read(fill, place.dtype, into, after, watch)
        finally:
            self._idle.put(reader)

    def _fill(self, place: Place, start: int, nbytes: int, buffer: Tensor) -> Tensor:
        skipped = (place.offset + start) % PAGE_BYTES
        pages = buffer[: whole_pages(skipped + nbytes)].numpy().data
        self._files[place.file].read(place.offset + start - skipped, skipped + nbytes, [pages])
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
