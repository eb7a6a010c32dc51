"""What every tokenizer offers, under Megatron's names."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from scmoe_ds.errors import DataError


class Tokenizer(ABC):
    """Text to token ids and back, with what megatron-core's ``GPTDataset`` reads of a tokenizer.

    Attributes:
        name: the value of ``--tokenizer-type`` that selects this class.
        vocab_size: number of ids, before padding; every id is in ``0 .. vocab_size - 1``.
        eod: id of the end-of-document token.
        unique_identifiers: JSON-serialisable description; GPTDataset hashes it into its cache key, so it
            must change whenever the vocabulary does. It holds no path: moving a file invalidates nothing.
    """

    name: str
    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, Any]

    @property
    def pad(self) -> int:
        """-1, GPTDataset's value for "no such token".

        GPTDataset masks the loss at the padding id and overwrites the token there with 0. Pretraining
        samples are always full, so a real id here could only damage text that happens to contain it.
        """
        return -1

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special token added, and none in place of a text that spells one."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; the inverse of ``tokenize`` on its output."""

    def vocabulary(self) -> dict[str, int]:
        """Its tokens, as its files spell them, and their ids."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """Names and contents of the files from which ``tokenizer_in`` makes it again."""
        raise NotImplementedError

    def _describe(self, vocabulary: Iterable[bytes]) -> None:
        """Set ``unique_identifiers`` from the class, its sizes and a digest of the vocabulary."""
        digest = hashlib.sha256()
        for part in vocabulary:
            digest.update(part)
        self.unique_identifiers = OrderedDict(
            [
                ("class", self.name),
                ("vocab_size", self.vocab_size),
                ("eod", self.eod),
                ("vocabulary_sha256", digest.hexdigest()),
            ]
        )


def missing_package(package: str, tokenizer_type: str) -> DataError:
    """The error for a tokenizer whose package is not there."""
    return DataError(
        f"--tokenizer-type {tokenizer_type} needs the package {package!r}, which is not installed. "
        "Install it, or use --tokenizer-type ByteTokenizer."
    )
