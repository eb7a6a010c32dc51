"""The loss of a model on a held-out text, for comparing states of one model with each other.

Shape suffixes: B rows, S tokens of each, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scmoe_ds.errors import EvaluationError
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import SlidingWindow, row_of


@dataclass(frozen=True)
class HeldOut:
    """A text, of which every token is predicted once, in windows without overlap: `scmoe evaluate --text-file TEXT
    --seq-length S --stride S` measures the same.

    Attributes:
        tokens: [N] ids of any integer dtype.
        seq_length: of a window, S.
        end_of_document: id of the token that the first window begins with.
        source: flag and file, for errors.

    Raises:
        EvaluationError: the text has less than one window.
    """

    tokens: np.ndarray
    seq_length: int
    end_of_document: int
    source: str

    def __post_init__(self) -> None:
        if len(self.tokens) < self.seq_length:
            raise EvaluationError(
                f"{self.source} has {len(self.tokens)} tokens, less than one window of {self.seq_length}; give more "
                "text, or a smaller --seq-length"
            )

    def loss(self, scorer: Scorer) -> float:
        """Nats per token. Collective. Raises an EvaluationError if it is not finite."""
        rule = SlidingWindow(self.seq_length, self.seq_length)
        rows = [row_of(self.tokens, window, self.end_of_document) for window in rule.windows(len(self.tokens))]
        loss = float(scorer.score_all(rows)[:, 0].sum()) / len(self.tokens)
        if not math.isfinite(loss):
            raise EvaluationError(
                f"{self.source}: the loss is {loss}; the weights are not finite, or --dtype cannot hold what the model "
                "computes; give --dtype fp32"
            )
        return loss


class CausalModel:
    """A causal model of transformers as a `Scorer` sees a GPT.

    Where the family's logits are those of its head alone, they are computed in pieces, as those of a GPT. A family that
    scales them gives them itself.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self._model, head = model, model.get_output_embeddings()
        self.embedding: nn.Module = model.get_input_embeddings()
        probe = torch.zeros(1, 2, dtype=torch.int64, device=self.embedding.weight.device)
        with torch.inference_mode():
            plain = head(model.base_model(probe, use_cache=False).last_hidden_state)
            self._head = head if torch.equal(plain, model(probe, use_cache=False).logits) else nn.Identity()

    def hidden_states(self, tokens: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[B, S] → what `logits` reads. Padding is on the right, where no other token sees it."""
        how = {"attention_mask": None if used_token is None else (used_token != 0).long(), "use_cache": False}
        if isinstance(self._head, nn.Identity):
            scaled: Tensor = self._model(tokens, **how).logits
            return scaled
        hidden_BSD: Tensor = self._model.base_model(tokens, **how).last_hidden_state
        return hidden_BSD

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] of `hidden_states` → [..., V]."""
        found: Tensor = self._head(hidden)
        return found
