"""The input of a language model in an analysis: disjoint sequences of a token stream, in order.

Documents follow each other as in pretraining. The stream is a data set, which stays on disk, or a text
(`scmoe_ds.data.text_file`).

Shape suffixes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scmoe_ds.data.indexed import check_token_range, read_layout
from scmoe_ds.data.splits import split_ranges
from scmoe_ds.errors import AnalysisError


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of a stream of tokens.

    Attributes:
        tokens: [N] ids of any integer dtype; may be memory-mapped.
        seq_length: tokens of a sequence; an incomplete last sequence is not read.
        max_tokens: most tokens to read; None reads all.
        source: flag and file, for errors.

    Raises:
        AnalysisError: there is less than one sequence.
    """

    tokens: np.ndarray
    seq_length: int
    max_tokens: int | None
    source: str

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.seq_length:
            what = f"--max-tokens {self.max_tokens}: less than one sequence of {self.seq_length} tokens"
            raise AnalysisError(f"{what}; raise it, or give a smaller --seq-length")
        if len(self.tokens) < self.seq_length:
            raise AnalysisError(
                f"{self.source} has {len(self.tokens)} tokens, less than one sequence of "
                f"{self.seq_length}; give more text, or a smaller --seq-length"
            )

    def __len__(self) -> int:
        available = len(self.tokens) if self.max_tokens is None else min(len(self.tokens), self.max_tokens)
        return available // self.seq_length

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """[B, S] int64; the last one may have fewer rows."""
        for first in range(0, len(self), batch_size):
            last = min(first + batch_size, len(self))
            block = self.tokens[first * self.seq_length : last * self.seq_length].astype(np.int64)
            yield torch.from_numpy(block).view(last - first, self.seq_length)

    def labelled_batches(self, batch_size: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `count` full batches of tokens and next tokens, each [B, S] int64. Raises an AnalysisError if there
        are fewer batches."""
        per_batch = batch_size * self.seq_length
        available = (min(len(self) * self.seq_length, len(self.tokens) - 1)) // per_batch
        if available < count:
            raise AnalysisError(
                f"{self.source} has {available} micro-batches of {batch_size} sequences of "
                f"{self.seq_length} tokens, but {count} are asked for; give more text, or lower "
                "--micro-batches, --batch-size or --seq-length"
            )
        for number in range(count):
            begin = number * per_batch
            block = torch.from_numpy(self.tokens[begin : begin + per_batch + 1].astype(np.int64))
            yield block[:-1].view(batch_size, -1), block[1:].reshape(batch_size, -1)


def read_data_set(prefix: str, split: str | None, vocab_size: int) -> np.ndarray:
    """The tokens of `<prefix>.bin` in order, memory-mapped.

    Args:
        split: shares of train, valid and test, of which the validation part is read; None reads all.

    Raises:
        DataError: a file is missing or damaged, an id is outside of the vocabulary, or the split is invalid.
        AnalysisError: the split has no validation part.
    """
    layout = read_layout(prefix)
    check_token_range(layout, vocab_size)
    tokens = layout.tokens()
    if split is None:
        return tokens
    validation, offsets = split_ranges(split, len(layout.lengths))[1], layout.offsets()
    if offsets[validation.start] == offsets[validation.stop]:
        raise AnalysisError(
            f"--split {split} leaves no validation part of --data-path {prefix}: give another one, or "
            "leave --split out to read all of it"
        )
    return tokens[offsets[validation.start] : offsets[validation.stop]]
