"""Sliding windows: which tokens a forward pass reads, and which of them it scores.

An end-of-document token comes before a document, so that its first token is predicted too. Every token is scored once.
lm_eval's rolling log likelihood has the same rule, with a stride of the whole window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """One forward pass over a document t[0], t[1], …

    Attributes:
        begin: it reads from t[begin - 1], or if 0 from the end-of-document token before the document.
        first, stop: it scores t[first:stop] and reads up to t[stop - 2].
    """

    begin: int
    first: int
    stop: int


class Row(NamedTuple):
    """The input of a model and the labels to score.

    Attributes:
        tokens: int64 [S], S ≥ 1.
        labels: int64 [K], K ≤ S: the token after each of the last K tokens.
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class SlidingWindow:
    """The rule.

    Attributes:
        seq_length: most tokens that a pass reads.
        stride: tokens by which a window moves. Tokens that the first window does not score have at least
            seq_length - stride tokens before them. The last window ends with the document.
    """

    seq_length: int
    stride: int

    def windows(self, num_tokens: int) -> Iterator[Window]:
        """The windows of a document of `num_tokens`, in order."""
        stop = min(self.seq_length, num_tokens)
        if stop:
            yield Window(0, 0, stop)
        while stop < num_tokens:
            first, stop = stop, min(stop + self.stride, num_tokens)
            yield Window(stop - self.seq_length, first, stop)

    def count(self, lengths: np.ndarray) -> int:
        """Number of windows of documents of these lengths."""
        lengths = lengths.astype(np.int64)
        later = -(-np.maximum(lengths - self.seq_length, 0) // self.stride)
        return int((later + (lengths > 0)).sum())


def row_of(document: np.ndarray | Sequence[int], window: Window, end_of_document: int) -> Row:
    """A window's tokens. Nothing else is read of a memory-mapped document."""
    read = np.asarray(document[max(window.begin - 1, 0) : window.stop], dtype=np.int64)
    if window.begin == 0:
        read = np.concatenate([np.array([end_of_document]), read])
    return Row(read[:-1], read[len(read) - (window.stop - window.first) :])
