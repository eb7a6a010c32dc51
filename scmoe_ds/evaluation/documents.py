"""The documents to evaluate: those of an indexed dataset, or one text file."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from scmoe_ds.data.indexed import check_token_range, content_digest, read_layout
from scmoe_ds.data.splits import split_ranges
from scmoe_ds.data.text_file import read_text
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.errors import EvaluationError
from scmoe_ds.parallel.agreement import require_agreement, run_on_rank_zero, run_together


class Documents(ABC):
    """Documents of tokens.

    Attributes:
        lengths: int64 [N], tokens of each.
        num_words: whitespace-separated words of all documents; None when only tokens are there.
        identity: differs between ranks that read different texts.
    """

    lengths: np.ndarray
    num_words: int | None
    identity: tuple[str, int]

    @abstractmethod
    def tokens(self, document: int) -> np.ndarray:
        """[lengths[document]] token ids, of any integer dtype."""

    @abstractmethod
    def num_bytes(self, document: int) -> int:
        """Bytes of its text in UTF-8."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())


class IndexedDocuments(Documents):
    """The documents of `<prefix>.bin` and `.idx`, memory-mapped, so that at most one document is in memory.

    Args:
        split: shares of train, valid and test, of which the validation part is read. It may begin and end within a
            document that has several sequences. None reads all documents.

    Raises:
        DataError: a file is missing, damaged or of another tokenizer, or the split is invalid.
        EvaluationError: there are fewer than two tokens.
    """

    def __init__(self, prefix: str, split: str | None, tokenizer: Tokenizer) -> None:
        layout = read_layout(prefix, tokenizer.eod)
        count = len(layout.lengths)
        sequences = range(count) if split is None else split_ranges(split, count)[1]
        self._offsets = layout.document_offsets(sequences)
        self.lengths = np.diff(self._offsets)
        if self.num_tokens < 2:
            part = "the data set" if split is None else f"the validation part of --split {split}"
            remedy = "give more data" if split is None else "give more data or another split"
            raise EvaluationError(
                f"--data-path {prefix}: {part} is {len(sequences)} of {count} {layout.unit} with {self.num_tokens} "
                f"tokens; at least 2 are needed: {remedy}"
            )
        self._data = layout.tokens()
        self._layout, self._tokenizer = layout, tokenizer
        self.num_words = None
        self.identity = (f"{layout.fingerprint} {content_digest(layout)}", self.num_tokens)

    def check_tokens(self) -> None:
        """Raises a DataError if a token id is not in the vocabulary."""
        check_token_range(self._layout, self._tokenizer.vocab_size)

    def tokens(self, document: int) -> np.ndarray:
        return self._data[self._offsets[document] : self._offsets[document + 1]]

    def num_bytes(self, document: int) -> int:
        """Bytes of its text in UTF-8, without end-of-document tokens."""
        tokens = self.tokens(document)
        text = tokens[tokens != self._tokenizer.eod]
        if isinstance(self._tokenizer, ByteTokenizer):  # right also when a document ends within a character
            return len(text)
        return len(self._tokenizer.detokenize(text.tolist()).encode("utf-8", errors="replace"))


class TextDocument(Documents):
    """A UTF-8 text file as one document, byte for byte.

    Raises:
        DataError: the file is missing or not UTF-8, or the tokenizer has no vocabulary.
        EvaluationError: there are fewer than two tokens.
    """

    def __init__(self, path: str, tokenizer: Tokenizer) -> None:
        self._text = read_text(path, tokenizer, tokenizer.vocab_size)
        count = len(self._text.tokens)
        if count < 2:
            raise EvaluationError(f"--text-file {path} has {count} token(s); at least 2 are needed: give a longer text")
        self.lengths = np.array([count])
        self.num_words = self._text.num_words
        self.identity = (self._text.digest, count)

    def tokens(self, document: int) -> np.ndarray:
        return self._text.tokens

    def num_bytes(self, document: int) -> int:
        return self._text.num_bytes


def open_documents(data_path: str | None, split: str | None, text_file: str | None, tokenizer: Tokenizer) -> Documents:
    """The documents that the flags name. Collective.

    Raises:
        DataError, EvaluationError, RankDisagreementError: on all ranks: a rank cannot read them, or reads other ones.
    """

    def read() -> Documents:
        if data_path is None:
            assert text_file is not None
            return TextDocument(text_file, tokenizer)
        return IndexedDocuments(data_path, split, tokenizer)

    documents = run_together(read)
    require_agreement("the text to evaluate", documents.identity)
    if isinstance(documents, IndexedDocuments):
        run_on_rank_zero(documents.check_tokens)  # the same files on all ranks
    return documents
