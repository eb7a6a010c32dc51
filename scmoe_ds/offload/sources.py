"""Slower tiers that routed experts are read from: files, or pinned host memory beside a GPU.

A source copies one expert into tensors that it is given and returns at once; what it returns waits for the copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Literal, Protocol

import torch
from torch import Tensor

from scmoe_ds.offload.files import ExpertFile, Place
from scmoe_ds.offload.pinned import PinnedTensors
from scmoe_ds.offload.readers import PAGE_BYTES, Arrival, BufferedReader, Copied, Reader
from scmoe_ds.trace.migrations import MigrationWatch

PIECE_BYTES = (4 << 20) - 3 * PAGE_BYTES
"""What one reader reads at a time: enough for a disk's full rate, little enough that readers share an expert. With the
pages around it, it fills a buffer of a power of two, which pinned memory is rounded up to."""


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

    A file may be of another dtype than the model, and is converted as it arrives: bf16 experts that are computed in
    fp32 migrate in half the time.

    Args:
        places: of each parameter of this rank's routed experts, by its global name.
        remedy: for errors: what gives the files anew.
        device: of the tensors that are filled.
        readers: that read at the same time: one fills a buffer while another's is copied.

    Raises:
        ExpertFileError: a file that cannot be opened.
        ArgumentError: the system does not give enough pinned memory.
    """

    tier: Literal["host", "disk"] = "disk"

    def __init__(self, places: Mapping[str, Place], remedy: str, device: torch.device, readers: int = 2) -> None:
        self._places = places
        self._files = {file: ExpertFile(file, remedy) for file in {place.file for place in places.values()}}
        self._idle: SimpleQueue[BufferedReader] = SimpleQueue()
        for number in range(readers):
            self._idle.put(BufferedReader(device, number, PIECE_BYTES + 2 * PAGE_BYTES))
        self._pool = ThreadPoolExecutor(readers, "expert-reader")

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        pieces = []
        for name, tensor in into.items():
            place, elements = self._places[name], tensor.view(-1)
            assert elements.numel() * place.dtype.itemsize == place.nbytes, name
            for start in range(0, place.nbytes, PIECE_BYTES):
                first, end = (octet // place.dtype.itemsize for octet in (start, start + PIECE_BYTES))
                pieces.append(self._pool.submit(self._read, place, start, elements[first:end], after, watch))
        return _FromFile(pieces)

    def _read(
        self, place: Place, start: int, into: Tensor, after: Arrival | None, watch: MigrationWatch | None
    ) -> Copied:
        """One piece, on a thread of the pool."""
        reader = self._idle.get()
        try:
            fill = partial(self._fill, place, start, into.numel() * place.dtype.itemsize)
            return reader.read(fill, place.dtype, into, after, watch)
        finally:
            self._idle.put(reader)

    def _fill(self, place: Place, start: int, nbytes: int, buffer: Tensor) -> Tensor:
        skipped = (place.offset + start) % PAGE_BYTES
        self._files[place.file].read(place.offset + start - skipped, skipped + nbytes, buffer.numpy().data)
        return buffer[skipped : skipped + nbytes]


@dataclass(frozen=True)
class _FromFile:
    pieces: Sequence[Future[Copied]]

    def wait(self) -> None:
        """The host waits for the disk, the current stream for the copies."""
        for piece in self.pieces:
            piece.result().wait()
