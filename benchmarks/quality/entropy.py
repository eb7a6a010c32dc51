"""What a model without context, or with one token of it, would reach on the validation documents."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.quality.text_corpus import Corpus
from scmoe_ds.data.sequences import Sequences, unigram_entropy
from scmoe_ds.data.splits import split_ranges

_PRIOR = 100  # observations that the unigram frequencies count for behind each token; of 1 to 100 the best


def entropies(corpus: Corpus) -> dict[str, float]:
    """Nats per token of the validation documents.

    Returns:
        "unigram": of their own token frequencies. "bigram": their cross entropy under the training documents'
        frequencies of the next token, smoothed by the unigram frequencies, which a model has to beat. "bigram of their
        own": the conditional entropy of their own pairs, unsmoothed: a lower bound, as if they were known in advance.
    """
    data, size = Sequences(corpus.prefix), int(corpus.record["vocab_size"])
    train, validation, _ = split_ranges(corpus.split, len(data))
    seen, own = (_pairs(data, part, size) for part in (train, validation))
    unigram = (seen.sum(0) + 1) / (seen.sum() + size)
    smoothed = (seen + _PRIOR * unigram) / (seen.sum(1, keepdims=True) + _PRIOR)
    conditional = own / own.sum(1, keepdims=True).clip(min=1)
    return {
        "unigram": unigram_entropy(data, validation),
        "bigram": _mean_surprise(own, smoothed),
        "bigram of their own": _mean_surprise(own, conditional),
    }


def _pairs(data: Sequences, sequences: Iterable[int], size: int) -> np.ndarray:
    """[size, size] how often each token follows each."""
    tokens = np.concatenate([np.asarray(data.get(each), dtype=np.int64) for each in sequences])
    return np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).reshape(size, size)


def _mean_surprise(counts: np.ndarray, probabilities: np.ndarray) -> float:
    found = counts > 0
    return float(-(counts[found] * np.log(probabilities[found])).sum() / counts.sum())
