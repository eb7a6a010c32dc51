"""`engine.distill`: the source of a converted model teaches it, beside the model's own training pass.

Somebody else's model needs no other loop. In training, the teacher's pass precedes the model's, on the same inputs, and
the loss in the model's output is the loss of models/distillation.py:

    engine, *_ = scmoe_ds.initialize(model=model, config=ds)    # "scmoe": {…, "adapt": {"distill": {"alpha": 1.0}}}
    for batch in loader:
        outputs = engine(**batch)                               # input_ids, labels, …
        engine.backward(outputs.loss)
        engine.step()
        engine.distill.parts                                    # kl, lm, match of this micro-batch

A loop with a loss of its own hands over no labels, and calls `engine.distill.loss(outputs.logits, loss_mask=…, lm=…)`.
This package's GPT gets the targets as an argument of its forward pass (training/loop.py).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.streams import Streams
from scmoe_ds.engine.teacher import Teacher
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.distillation import LossParts, Targets
from scmoe_ds.models.divergence import BestTokens, WholeDistribution
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.conversion import Conversion

Stored = Callable[[range, Tensor], BestTokens]
"""What a teacher on disk says of some samples of the training data and their tokens [B, S]; on the tokens' device."""


class Distillation:
    """Self-distillation in one engine.

    Args:
        engine: of `scmoe_ds.initialize`; the model's weights are the source's.
        conversion: of its model.
        section: has `adapt.distill`.
        stored: a teacher on disk; None: the teacher is in memory.

    Attributes:
        weights: `adapt.distill`.
        teacher: None where no teacher is in memory.
        parts: of the last training pass, detached; None before the first.

    Raises:
        ScMoEConfigError: a teacher that cannot be, see `Teacher` and `Streams`.
    """

    def __init__(self, engine: Any, conversion: Conversion, section: ScMoEConfig, stored: Stored | None = None) -> None:
        assert section.adapt is not None and section.adapt.distill is not None
        self.weights, self._model, self._stored = section.adapt.distill, engine.module, stored
        is_taught = self.weights.alpha > 0 or self.weights.gamma > 0
        self.teacher = Teacher(engine, conversion) if is_taught and stored is None else None
        self._streams = Streams(engine.module, section) if self.weights.gamma > 0 else None
        self.parts: LossParts | None = None
        self._targets: Targets | None = None

    def teach(self, *args: Any, samples: range | None = None, **kwargs: Any) -> Targets:
        """The teacher's pass over a micro-batch, before the student's. Collective, like a pass of the model.

        Args:
            args, kwargs: of the model's forward pass.
            samples: numbers in the training data, for a teacher on disk.
        """
        if self.teacher is None:
            if self._stored is None or samples is None:  # the text alone teaches
                return Targets(self.weights)
            return Targets(self.weights, self._stored(samples, args[0]))
        if self._streams is not None:
            self._streams.begin()
        logits = self.teacher.run(lambda: self._logits(*args, **kwargs))
        distribution = WholeDistribution(logits) if self.weights.alpha > 0 else None
        if self._streams is None:
            return Targets(self.weights, distribution)
        with torch.no_grad():
            of_teacher = self._streams.take()
        self._streams.begin()  # the student's pass comes next
        return Targets(self.weights, distribution, of_teacher, self._streams.take)

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """`teach`, for the pass that comes next and the call of `loss` behind it."""
        self._targets = self.teach(*args, **kwargs)

    @property
    def is_pending(self) -> bool:
        """Whether the loss of the last training pass is still to be computed."""
        return self._targets is not None

    def _logits(self, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self._model, GPT):
            return self._model.local_logits(*args, **kwargs)
        others = {"labels": None, "num_items_in_batch": None, "use_cache": False}
        known = signature(self._model.forward).parameters
        kwargs = {**kwargs, **{name: value for name, value in others.items() if name in known or name in kwargs}}
        output = self._model.forward(*args, **kwargs)
        logits = output.get("logits") if isinstance(output, dict) else None
        if logits is None:
            raise ScMoEConfigError(
                f"scmoe.adapt.distill: {type(self._model).__name__} returns {type(output).__name__} without logits; a "
                "teacher needs a language model that returns a transformers.utils.ModelOutput with logits [B, S, V]"
            )
        return logits

    def loss(
        self,
        logits: Tensor,
        loss_mask: Tensor | None = None,
        lm: Callable[[], Tensor] | Tensor | None = None,
    ) -> Tensor:
        """The loss of the training pass that has just run, without the model's balancing loss; once per pass.

        Args:
            logits: [B, S, V] the model's.
            loss_mask: [B, S], 0 where the prediction of the next token does not count; None: all do.
            lm: mean cross entropy with the text, or what computes it; None: it is not known, and β has to be 0.

        Returns:
            a differentiable scalar, fp32.

        Raises:
            ScMoEConfigError: β > 0 without `lm`.
            RuntimeError: no training pass has run since the last call.
        """
        targets, self._targets = self._targets, None
        if targets is None:
            raise RuntimeError("engine.distill.loss: no training pass has run since the last call")
        if lm is None and self.weights.beta:
            raise ScMoEConfigError(
                f"scmoe.adapt.distill.beta = {self.weights.beta}: the language-model loss is not known; hand lm=… to "
                "engine.distill.loss, or labels to the model, or set 0"
            )
        known = logits.new_zeros((), dtype=torch.float32) if lm is None else lm
        parts = targets.loss(logits, known if callable(known) else lambda: known, loss_mask)
        self.note(parts)
        return parts.total

    def note(self, parts: LossParts) -> None:
        """Keeps the numbers of a pass for the log."""
        self.parts = LossParts(*(None if each is None else each.detach() for each in parts))  # type: ignore[arg-type]
