"""Loss and perplexity of documents, in float64 sums over all ranks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import EvaluationError
from scmoe_ds.evaluation.documents import Documents
from scmoe_ds.evaluation.scoring import Scorer, replica
from scmoe_ds.evaluation.windows import Row, SlidingWindow, Window, row_of
from scmoe_ds.parallel.agreement import is_rank_zero

logger = logging.getLogger("scmoe_ds")

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text.

    Attributes:
        nats: negative log likelihood of all tokens together.
        tokens: their number.
        bytes: of the text in UTF-8.
        words: separated by whitespace; None when only tokens are there.
        windows: forward passes over single rows.
    """

    nats: float
    tokens: int
    bytes: int
    words: int | None
    windows: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def record(self) -> dict[str, float | int]:
        """All numbers by name. A perplexity is exp(nats / number of tokens, words or bytes)."""
        numbers = {"tokens": self.tokens, "windows": self.windows, "loss": self.loss, "perplexity": _exp(self.loss)}
        if self.bytes:
            numbers["bytes"] = self.bytes
            numbers["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        if self.words is not None:
            numbers["byte_perplexity"] = _exp(self.nats / self.bytes)
            numbers["words"] = self.words
            if self.words:
                numbers["word_perplexity"] = _exp(self.nats / self.words)
        return numbers


def evaluate_documents(scorer: Scorer, documents: Documents, rule: SlidingWindow, tokenizer: Tokenizer) -> Perplexity:
    """Predicts every token of every document once, from the tokens before it in its document. Collective.

    The first token is predicted from end-of-document alone, as in lm_eval's rolling log likelihood. An end-of-document
    token that ends a document is predicted like any other.

    Raises:
        EvaluationError: the loss is not finite.
    """
    count = rule.count(documents.lengths)
    nats, done, shown = 0.0, 0, time.monotonic()
    for batch in scorer.own_batches(_windows(documents, rule), count):
        rows = _rows(batch, documents, tokenizer)
        nats += float(scorer.score(rows)[:, 0].sum())
        done += len(batch)
        if time.monotonic() - shown > _SECONDS_BETWEEN_LINES and is_rank_zero():
            shown = time.monotonic()
            logger.info(f"{min(done * replica()[1], count)} of {count} windows")
    rank, ranks = replica()
    own_bytes = sum(documents.num_bytes(document) for document in range(len(documents.lengths))[rank::ranks])
    totals = scorer.sum_over_replicas(torch.tensor([nats, float(own_bytes)], dtype=torch.float64))
    nats, num_bytes = totals.tolist()
    if not math.isfinite(nats):
        raise EvaluationError(
            f"the loss is {nats}: the weights of --load are not finite, or --dtype cannot hold what "
            "the model computes; evaluate with --dtype fp32"
        )
    return Perplexity(nats, documents.num_tokens, int(num_bytes), documents.num_words, count)


def first_rows(scorer: Scorer, documents: Documents, rule: SlidingWindow, tokenizer: Tokenizer) -> list[Row]:
    """This rank's first batch of `evaluate_documents`; empty where there are fewer windows than ranks."""
    batches = scorer.own_batches(_windows(documents, rule), rule.count(documents.lengths))
    return _rows(next(batches, []), documents, tokenizer)


def _rows(batch: list[tuple[int, Window]], documents: Documents, tokenizer: Tokenizer) -> list[Row]:
    return [row_of(documents.tokens(document), window, tokenizer.eod) for document, window in batch]


def _windows(documents: Documents, rule: SlidingWindow) -> Iterator[tuple[int, Window]]:
    for document, length in enumerate(documents.lengths):
        for window in rule.windows(int(length)):
            yield document, window


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # about the largest float
