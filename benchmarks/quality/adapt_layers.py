"""Which MoE layers of a trained model are converted first: those with the most similar ends of their shortcut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scmoe_ds.analysis.similarity import measure, verdict
from scmoe_ds.analysis.subjects import Subject
from scmoe_ds.evaluation.windows import Row


def by_similarity(subject: Subject, rows: Sequence[Row], batch_size: int, position: str) -> list[int]:
    """Numbers of the MoE layers, the most similar ends first.

    Args:
        rows: sequences to measure on.
        position: "pos1" to "pos3".
    """
    starts = range(0, len(rows), batch_size)
    found = measure(
        subject, (torch.from_numpy(np.stack([row.tokens for row in rows[at : at + batch_size]])) for at in starts)
    )
    layers = verdict(found, subject.moe_blocks)["positions"][position]["layers"]
    number = {block: layer for layer, (_, block) in enumerate(subject.moe_blocks)}
    return [number[each["block"]] for each in sorted(layers, key=lambda each: -each["cosine"])]
