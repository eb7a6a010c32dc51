"""The interface of all tokenizers, with Megatron's names."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from scmoe_ds.errors import DataError


class Tokenizer(ABC):
    """Text to token ids and back, with the attributes that megatron-core's ``GPTDataset`` reads.

    Attributes:
        name: the value of ``--tokenizer-type`` that selects this class.
        vocab_size: number of ids, before padding; every id is in ``0 .. vocab_size - 1``.
        eod: id of the end-of-document token.
        unique_identifiers: JSON-serialisable description. GPTDataset hashes it into its cache key, so it changes with
            the vocabulary. It holds no path, so that moved files keep their cache.
    """

    name: str
    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, Any]

    @property
    def pad(self) -> int:
        """-1, GPTDataset's value for "no such token".

        GPTDataset masks the loss at the padding id and overwrites the token with 0. Pretraining samples are always
        full, so a real id could only damage text that contains it.
        """
        return -1

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``. Adds no special tokens, and makes none of a text that spells one."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; the inverse of ``tokenize`` on its output."""

    def vocabulary(self) -> dict[str, int]:
        """The tokens, as the files spell them, and their ids."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """Names and contents of the files from which ``tokenizer_in`` makes the tokenizer again."""
        raise NotImplementedError

    def _describe(self, vocabulary: Iterable[bytes]) -> None:
        """Sets ``unique_identifiers`` from the class, its sizes and a digest of the vocabulary."""
        digest = hashlib.sha256(b"".join(vocabulary)).hexdigest()
        sizes = {"vocab_size": self.vocab_size, "eod": self.eod}
        self.unique_identifiers = OrderedDict({"class": self.name, **sizes, "vocabulary_sha256": digest})


def missing_package(package: str, tokenizer_type: str) -> DataError:
    """The error for a tokenizer whose package is not installed."""
    return DataError(
        f"--tokenizer-type {tokenizer_type} needs the package {package!r}, which is not installed. "
        "Install it, or use --tokenizer-type ByteTokenizer."
    )
