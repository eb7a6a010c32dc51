"""Writing indexed datasets, and a default corpus that every machine with Python already has."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import sysconfig
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from scmoe_ds.data.checksums import file_entry
from scmoe_ds.data.index_cache import replaced
from scmoe_ds.data.reader import read_document
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.errors import DataError

# megatron-core takes seconds to import, so it is imported where a dataset is opened or written.
if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from typing_extensions import Self

# Installed packages, tests (more text than the library itself, much of it repeated), and two packages
# that are tables rather than text: code pages, and one 700 kB string literal of help topics.
_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
# An administrator's files, and the build's own record, full of the building machine's paths.
_SKIPPED_FILES = ("sitecustomize.py", "usercustomize.py", "_sysconfigdata")
_CORPUS_NAME = "python_stdlib"
_CORPUS_FORMAT = 1  # raise it when the choice, order or encoding of the documents changes
_SHUFFLE_SEED = 1234
_ENTROPY_BLOCK_TOKENS = 1 << 20


@dataclass(frozen=True)
class DatasetSummary:
    """What was written: the path prefix, the number of documents and of tokens, the token's NumPy dtype."""

    prefix: str
    num_documents: int
    num_tokens: int
    dtype: str


class IndexedDatasetWriter:
    """Context manager that writes ``<prefix>.bin`` and ``<prefix>.idx``, both or neither.

    Tokens go to temporary files in the same directory; a clean exit renames them, an exception removes
    them. A reader therefore never sees a half-written file.

    Args:
        prefix: output path without extension; its directory must exist.
        vocab_size: ids must be below it; under 65500 it selects uint16, else int32 (Megatron's rule).

    Raises:
        DataError: the directory is missing or not writable, a document is empty or holds an id outside
            the vocabulary, or nothing was written.
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
                f"cannot write {prefix}.bin: {error.strerror}. The directory {directory} must exist and be "
                "writable: create it, or choose another output prefix."
            ) from error

    def __enter__(self) -> Self:
        return self

    def add(self, document: Sequence[int] | np.ndarray) -> None:
        """Append one document, a 1-D sequence of token ids."""
        tokens = np.asarray(document, dtype=np.int64)
        if tokens.size == 0:
            raise DataError(f"document {self.num_documents} of {self.prefix} is empty: leave it out.")
        least, greatest = int(tokens.min()), int(tokens.max())
        if least < 0 or greatest >= self.vocab_size:
            raise DataError(
                f"document {self.num_documents} of {self.prefix} holds token id "
                f"{least if least < 0 else greatest}, outside 0..{self.vocab_size - 1}: the vocabulary size "
                "and the tokenizer do not belong together."
            )
        if tokens.size > np.iinfo(np.int32).max:
            raise DataError(
                f"document {self.num_documents} of {self.prefix} has {tokens.size} tokens; an index counts them in 31 "
                "bits: divide the document."
            )
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
            with suppress(OSError):  # of a full disk, which has been said
                self._builder.data_file.close()
            for extension in (".bin", ".idx"):
                Path(self._staged + extension).unlink(missing_ok=True)

    def _unwritten(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self.prefix}.bin and .idx: {error.strerror or error}. Make room, or choose "
            "another output prefix."
        )

    def _commit(self) -> None:
        if self.num_documents == 0:
            raise DataError(f"there is no document to write to {self.prefix}: the input holds no text.")
        self._builder.finalize(self._staged + ".idx")
        # A dataset is looked up by its index, so the index comes last.
        Path(self._staged + ".bin").replace(self.prefix + ".bin")
        Path(self._staged + ".idx").replace(self.prefix + ".idx")
        dtype = np.dtype(self._dtype).name
        self.summary = DatasetSummary(self.prefix, self.num_documents, self._num_tokens, dtype)


def write_indexed_dataset(
    prefix: str, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> DatasetSummary:
    """Write documents of token ids to ``<prefix>.bin`` and ``<prefix>.idx``, both or neither.

    Raises:
        DataError: as ``IndexedDatasetWriter``; whatever ``documents`` raises passes through.
    """
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    assert writer.summary is not None
    return writer.summary


def standard_library_documents() -> Iterator[tuple[str, str]]:
    """The running interpreter's own library sources as (path inside the library, text), sorted by path.

    About 10 MB in 600 files (CPython 3.11). Left out: tests, installed packages, tables, what a build or an
    administrator adds, links, and files that are empty or not UTF-8.

    Raises:
        DataError: the library is installed without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    found = False
    for name in names:
        path = root / name
        skipped = name.startswith(_SKIPPED_FILES) or _SKIPPED_DIRECTORIES & set(name.split("/")[:-1])
        if skipped or path.is_symlink():
            continue
        try:
            text = read_document(path)
        except (DataError, OSError):
            continue
        if text:
            found = True
            yield name, text
    if not found:
        raise DataError(
            f"{root} holds no .py files, so there is no default corpus: this Python comes without library "
            "sources. Give a dataset of your own with --data-path."
        )


def prepare_default_corpus(directory: str | os.PathLike[str]) -> str:
    """Write the standard-library corpus with ``ByteTokenizer``, unless a current one is there.

    Creates ``directory`` if needed, and in it ``python_stdlib.bin``, ``.idx`` and ``.json``, which records
    what the first two were made from. Processes that call it at once write the same bytes and replace
    whole files, so none of them can see another's half-done work.

    Returns:
        The path prefix ``<directory>/python_stdlib``.

    Raises:
        DataError: the directory cannot be written, or the interpreter has no library sources.
    """
    prefix = os.path.join(os.fspath(directory), _CORPUS_NAME)
    if _is_current(prefix):
        return prefix
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {directory} for the default corpus: {error.strerror}.") from error
    tokenizer = ByteTokenizer()
    texts = [text for _, text in standard_library_documents()]
    # GPTDataset's --split takes contiguous ranges of documents. In alphabetical order the test split
    # would hold only the last few modules (zipfile, zoneinfo), which are unlike the rest.
    random.Random(_SHUFFLE_SEED).shuffle(texts)
    documents = ([*tokenizer.tokenize(text), tokenizer.eod] for text in texts)
    summary = write_indexed_dataset(prefix, documents, tokenizer.vocab_size)
    sizes = {key: value for key, value in asdict(summary).items() if key != "prefix"}
    record = json.dumps({**_corpus_identity(), **sizes, "files": _entries(prefix)}, indent=2)
    with replaced(Path(prefix + ".json")) as staged:
        staged.write_text(record + "\n", encoding="utf-8")
    return prefix


def unigram_entropy(source: str | IndexedDataset, sequences: Iterable[int] | None = None) -> float:
    """Entropy of the token frequencies: the loss of the best model that ignores context.

    Args:
        source: path prefix, or an open ``IndexedDataset``.
        sequences: which to count, by number; all if None.

    Returns:
        Nats per token. Streams: memory does not grow with the dataset.

    Raises:
        DataError: the sequences hold no token.
    """
    if isinstance(source, str):
        from scmoe_ds.data.sequences import Sequences

        source = Sequences(source)
    counts = np.zeros(0, dtype=np.int64)
    for block in _token_blocks(source, sequences if sequences is not None else range(len(source))):
        block_counts = np.bincount(block, minlength=counts.size)
        block_counts[: counts.size] += counts
        counts = block_counts
    total = int(counts.sum())
    if total == 0:
        raise DataError("the entropy of no tokens is undefined: there is no sequence, or all are empty.")
    nonzero = counts[counts > 0]
    return math.log(total) - float((nonzero * np.log(nonzero)).sum()) / total


def _token_blocks(dataset: IndexedDataset, sequences: Iterable[int]) -> Iterator[np.ndarray]:
    """Sequences joined into blocks, because counting has a cost per call that grows with the vocabulary."""
    pending: list[np.ndarray] = []
    pending_tokens = 0
    for index in sequences:
        tokens = np.asarray(dataset.get(index))
        pending.append(tokens)
        pending_tokens += tokens.size
        if pending_tokens >= _ENTROPY_BLOCK_TOKENS:
            yield np.concatenate(pending)
            pending, pending_tokens = [], 0
    if pending:
        yield np.concatenate(pending)


def _corpus_identity() -> dict[str, Any]:
    return {
        "format": _CORPUS_FORMAT,
        "python": sys.version,
        "tokenizer": ByteTokenizer.name,
        "shuffle_seed": _SHUFFLE_SEED,
    }


def _is_current(prefix: str) -> bool:
    """Whether the record beside the corpus matches this interpreter and the checksums of both files."""
    try:
        record = json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
        return all(record[key] == value for key, value in {**_corpus_identity(), "files": _entries(prefix)}.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _entries(prefix: str) -> dict[str, Any]:
    return {extension: file_entry(Path(prefix + extension)) for extension in (".bin", ".idx")}
