"""Checks whether the numbers of a training step are finite, and describes those that are not.

The loss is checked on the device. The finding is part of the all-reduce with which all ranks agree on stopping
(`StopRequest.agreed`), so a step needs no additional wait or communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.errors import TrainingError

MOST_SKIPPED_STEPS = 50
"""In a row. A dynamic loss scale of 2^32 reaches 1 in fewer steps, so a run that continues does not train."""
_FINE, _NORM = 0, 1


class StepHealth:
    """Watches one run.

    Args:
        engine: DeepSpeed's.
        micro_batches: of one iteration, over all data-parallel ranks.
    """

    def __init__(self, engine: Any, micro_batches: int) -> None:
        self.engine, self.micro_batches = engine, micro_batches
        # With fp16, loss scaling causes overflows now and then; DeepSpeed skips these steps.
        self._expects_overflows = bool(engine.fp16_enabled())
        self._worst: Tensor | None = None
        self._skipped = engine.skipped_steps
        self.skipped_in_a_row = 0

    def note(self, loss: Tensor, number: int) -> None:
        """Checks the loss of micro-batch `number` of the iteration, counted over all data-parallel ranks."""
        if self._expects_overflows:
            return
        loss = loss.detach()
        # The earliest micro-batch has the largest code, so the maximum over ranks names it.
        code = 2 * (self.micro_batches - number) + loss.isnan().long()
        code = torch.where(loss.isfinite(), _FINE, code)
        self._worst = code if self._worst is None else torch.maximum(self._worst, code)

    def finding(self) -> Tensor | int:
        """A code for `StopRequest.agreed` about the last step; 0 if all is well."""
        worst, self._worst = self._worst, None
        if self._expects_overflows:
            return _FINE
        norm = self.engine.get_global_grad_norm()
        if norm is None or worst is None:
            return _FINE if worst is None else worst
        norm = torch.as_tensor(norm, device=worst.device)
        bad_norm = torch.where(norm.isfinite(), _FINE, _NORM)
        return torch.maximum(worst, bad_norm)

    def explain(self, code: int) -> tuple[str, int | None]:
        """A code in words, and the micro-batch that it is about (None for the gradient)."""
        if code == _NORM:
            return "the gradient norm is not finite, while the loss is", None
        return f"loss is {'nan' if code % 2 else 'inf'}", self.micro_batches - code // 2

    def check_skipped_steps(self, iteration: int) -> None:
        """Call it after every step. DeepSpeed skips a step on all ranks or on none. Raises a TrainingError if the last
        `MOST_SKIPPED_STEPS` steps were all skipped."""
        before, self._skipped = self._skipped, self.engine.skipped_steps
        skipped = self.skipped_in_a_row = self.skipped_in_a_row + 1 if self._skipped > before else 0
        if skipped >= MOST_SKIPPED_STEPS:
            raise overflows_at_any_scale(
                iteration, f"the last {skipped} steps were skipped", since=iteration - skipped + 1
            )


def overflows_at_any_scale(iteration: int, finding: str, since: int) -> TrainingError:
    """The error for an fp16 run whose gradients overflow at any loss scale since iteration `since`."""
    return TrainingError(
        f"iteration {iteration}: {finding}, because fp16 gradients are not finite at any loss scale; the weights have "
        "not changed since. Use bf16, lower the learning rate, or go back to an earlier checkpoint; with a fixed "
        "fp16.loss_scale, set it to 0 (dynamic)",
        since,
    )


def is_loss_scale_exhausted(error: Exception) -> bool:
    """Whether DeepSpeed gave up on its dynamic loss scale; it raises a bare Exception."""
    return "loss scale already at minimum" in str(error)


def not_finite(
    what: str, iteration: int, place: str, samples: Sequence[int], documents: Sequence[str] = ()
) -> TrainingError:
    """The error for a run that has diverged or met bad data.

    Args:
        what: the finding in words.
        place: micro-batch and rank, in words; empty if unknown.
        samples: global indices in the training set.
        documents: that contain the samples, in words.
    """
    where = f" in {place}" if place else ""
    if len(samples) > 1:
        where += f", training samples {samples[0]}–{samples[-1]}"
    elif samples:
        where += f", training sample {samples[0]}"
    if documents:
        where += f" ({'; '.join(documents)})"
    return TrainingError(
        f"iteration {iteration}: {what}{where}; this step was not saved. "
        f"{'Look at these samples, lower' if samples else 'Lower'} the learning rate or set gradient_clipping",
        since=iteration,
    )
