"""Writes Megatron's indexed datasets."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from scmoe_ds.errors import DataError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class DatasetSummary:
    """A written dataset: its path prefix, numbers of documents and tokens, and the NumPy dtype of a token."""

    prefix: str
    num_documents: int
    num_tokens: int
    dtype: str


class IndexedDatasetWriter:
    """Context manager that writes ``<prefix>.bin`` and ``<prefix>.idx``, both or neither.

    Tokens go to temporary files in the same directory. A clean exit renames them, and an exception removes them, so a
    reader never sees a half-written file.

    Args:
        prefix: output path without extension; its directory must exist.
        vocab_size: ids must be below it. Below 65500 tokens are uint16, otherwise int32 (Megatron's rule).

    Raises:
        DataError: the directory is missing or not writable, a document is empty or holds an id outside the vocabulary,
            or there is no document.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.vocab_size = vocab_size
        self.summary: DatasetSummary | None = None  # set by a clean exit
        self.num_documents = 0
        self._num_tokens = 0
        self._dtype = DType.optimal_dtype(vocab_size)
        self._staged = f"{prefix}.{uuid.uuid4().hex}.tmp"
        directory = Path(prefix).absolute().parent
        try:
            self._builder = IndexedDatasetBuilder(self._staged + ".bin", dtype=self._dtype)
        except OSError as error:
            raise DataError(
                f"cannot write {prefix}.bin: {error.strerror}. The directory {directory} must exist and be writable: "
                "create it, or choose another output prefix."
            ) from error

    def __enter__(self) -> Self:
        return self

    def add(self, document: Sequence[int] | np.ndarray) -> None:
        """Appends one document, a 1-D sequence of token ids."""
        tokens, name = np.asarray(document, dtype=np.int64), f"document {self.num_documents} of {self.prefix}"
        if tokens.size == 0:
            raise DataError(f"{name} is empty: leave it out.")
        least, greatest = int(tokens.min()), int(tokens.max())
        if least < 0 or greatest >= self.vocab_size:
            raise DataError(
                f"{name} holds token id {least if least < 0 else greatest}, outside 0..{self.vocab_size - 1}: "
                "the vocabulary size and the tokenizer do not belong together."
            )
        if tokens.size > np.iinfo(np.int32).max:
            raise DataError(f"{name} has {tokens.size} tokens; an index counts them in 31 bits: divide the document.")
        try:
            self._builder.add_document(tokens, [tokens.size])
        except OSError as error:
            raise self._unwritten(error) from error
        self.num_documents += 1
        self._num_tokens += int(tokens.size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as os_error:
            raise self._unwritten(os_error) from os_error
        finally:
            with suppress(OSError):  # a full disk, which has been reported
                self._builder.data_file.close()
            for extension in (".bin", ".idx"):
                Path(self._staged + extension).unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> DataError:
        what = f"cannot write {self.prefix}.bin and .idx: {error.strerror or error}"
        return DataError(f"{what}. Make room, or choose another output prefix.")

    def _commit(self) -> None:
        if self.num_documents == 0:
            raise DataError(f"there is no document to write to {self.prefix}: the input holds no text.")
        self._builder.finalize(self._staged + ".idx")
        # Readers look for the index, so it comes last.
        Path(self._staged + ".bin").replace(self.prefix + ".bin")
        Path(self._staged + ".idx").replace(self.prefix + ".idx")
        dtype = np.dtype(self._dtype).name
        self.summary = DatasetSummary(self.prefix, self.num_documents, self._num_tokens, dtype)


def write_indexed_dataset(
    prefix: str, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> DatasetSummary:
    """Writes documents of token ids to ``<prefix>.bin`` and ``<prefix>.idx``, both or neither.

    Raises:
        DataError: as ``IndexedDatasetWriter``. Errors of ``documents`` pass through.
    """
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    assert writer.summary is not None
    return writer.summary
