"""Megatron's indexed dataset, read so that damage has a name."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from scmoe_ds.data.indexed import with_uncounted_eod
from scmoe_ds.errors import DataError


class Sequences(IndexedDataset):
    """The token sequences of ``<prefix>.bin`` and ``.idx``, which ``read_layout`` has checked.

    Differs from megatron-core's class in two ways: end-of-document tokens that the index does not count belong to their
    documents, and a .bin that becomes shorter while it is read is an error, not a signal.

    Raises:
        DataError: when a sequence is read: the file is shorter than its index says, or cannot be read.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix, mmap=False)

    def initialize(self, path_prefix: str, *args: Any, **kwargs: Any) -> None:
        """megatron-core calls it when the dataset is made, and when a data loader's process gets its copy."""
        super().initialize(path_prefix, *args, **kwargs)
        self.bin_reader = _BinReader(path_prefix + ".bin")
        index, itemsize = self.index, np.dtype(self.index.dtype).itemsize
        num_tokens = os.path.getsize(path_prefix + ".bin") // itemsize
        counted = with_uncounted_eod(index.sequence_lengths, index.document_indices, num_tokens)
        if counted is not None:
            index.sequence_lengths = counted
            index.sequence_pointers = (np.cumsum(counted, dtype=np.int64) - counted) * itemsize


class _BinReader:
    """Reads tokens at a place of a file; several processes may share it.

    A memory map would end the process with SIGBUS where the file has become shorter, or its disk has failed.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as the dataset

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """[count] tokens from byte ``offset`` on."""
        tokens = np.empty(count, dtype)
        octets, done = tokens.view(np.uint8), 0
        while done < octets.size:  # one call reads 2 GiB at most
            try:
                step = os.preadv(self._file.fileno(), [octets[done:].data], int(offset) + done)
            except OSError as error:
                raise DataError(
                    f"{self._path} cannot be read at byte {int(offset) + done}: {error.strerror}."
                ) from error
            if step == 0:
                raise DataError(
                    f"{self._path} ends before byte {int(offset) + octets.size}, which its index describes: it was "
                    "truncated while it was in use. Copy it again and start from the last checkpoint."
                )
            done += step
        return tokens
