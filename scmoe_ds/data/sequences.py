"""Reads the sequences of Megatron's indexed datasets, and reports damage as an error."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from scmoe_ds.data.indexed import with_uncounted_eod
from scmoe_ds.errors import DataError

_ENTROPY_BLOCK_TOKENS = 1 << 20


class Sequences(IndexedDataset):
    """The token sequences of ``<prefix>.bin`` and ``.idx``, which ``read_layout`` has checked.

    Differs from megatron-core's class in two ways. End-of-document tokens that the index does not count belong to their
    documents. When the .bin becomes shorter while it is read, that is an error, not a signal.

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
    """Reads tokens at an offset of a file; several processes may share it.

    A memory map would end the process with SIGBUS when the file becomes shorter or its disk fails.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as the dataset

    def read(self, dtype: Any, count: int, offset: int) -> np.ndarray:
        """[count] tokens, the first at byte ``offset``."""
        offset = int(offset)  # megatron-core's is NumPy's
        tokens = np.empty(count, dtype)
        octets, done = tokens.view(np.uint8), 0
        while done < octets.size:  # one call reads 2 GiB at most
            try:
                step = os.preadv(self._file.fileno(), [octets[done:].data], offset + done)
            except OSError as error:
                raise DataError(f"{self._path} cannot be read at byte {offset + done}: {error.strerror}.") from error
            if step == 0:
                raise DataError(
                    f"{self._path} ends before byte {offset + octets.size}, which its index describes: it was "
                    "truncated while it was in use. Copy it again and start from the last checkpoint."
                )
            done += step
        return tokens


def unigram_entropy(dataset: IndexedDataset, sequences: Iterable[int]) -> float:
    """Entropy of the token frequencies of some sequences: the loss of the best model that ignores context.

    Returns:
        Nats per token. Memory does not grow with the dataset.

    Raises:
        DataError: the sequences hold no token.
    """
    counts = np.zeros(0, dtype=np.int64)
    for block in _token_blocks(dataset, sequences):
        block_counts = np.bincount(block, minlength=counts.size)
        block_counts[: counts.size] += counts
        counts = block_counts
    total = int(counts.sum())
    if total == 0:
        raise DataError("the entropy of no tokens is undefined: there is no sequence, or all are empty.")
    nonzero = counts[counts > 0]
    return math.log(total) - float((nonzero * np.log(nonzero)).sum()) / total


def _token_blocks(dataset: IndexedDataset, sequences: Iterable[int]) -> Iterator[np.ndarray]:
    """Sequences joined into blocks: a count costs time per call, which grows with the vocabulary."""
    pending, num_tokens = [], 0
    for index in sequences:
        pending.append(dataset.get(index))
        num_tokens += pending[-1].size
        if num_tokens >= _ENTROPY_BLOCK_TOKENS:
            yield np.concatenate(pending)
            pending, num_tokens = [], 0
    if pending:
        yield np.concatenate(pending)
