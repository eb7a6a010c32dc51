"""A text with and without what a model leaves out: quality and time beside each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.evaluation.documents import Documents
from scmoe_ds.evaluation.perplexity import Perplexity, evaluate_documents, first_rows
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import SlidingWindow
from scmoe_ds.inference.dropping import Dropped, Shares

_MOST_PASSES = 64
"""Until schedules are chosen: calibration and comparison take about 20."""


@dataclass(frozen=True)
class Timed:
    """One evaluation.

    Attributes:
        seconds: of this rank.
    """

    found: Perplexity
    seconds: float

    def record(self) -> dict[str, Any]:
        """All numbers by name."""
        return {**self.found.record(), "tokens_per_second": self.found.tokens / self.seconds}


def compare(
    scorer: Scorer, documents: Documents, rule: SlidingWindow, tokenizer: Tokenizer, drops: Dropped
) -> tuple[Timed, Timed, Shares]:
    """Without drops, with them, and what they were. Collective.

    Times are of whole evaluations, one after the other, once the schedules are chosen and both ways have run once.

    Raises:
        EvaluationError: a loss is not finite.
    """
    rows = first_rows(scorer, documents, rule, tokenizer)

    def timed() -> Timed:
        started = time.perf_counter()
        found = evaluate_documents(scorer, documents, rule, tokenizer)
        return Timed(found, time.perf_counter() - started)

    with drops.paused():
        for _ in range(_MOST_PASSES):
            scorer.score(rows)
            if not any(each.calibrating or each.comparison for each in scorer.calibrators.values()):
                break
        scorer.score(rows)
        without = timed()
    scorer.score(rows)
    drops.reset()
    return without, timed(), drops.shares()
