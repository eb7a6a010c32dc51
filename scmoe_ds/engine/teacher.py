"""The teacher of a converted model: the source's function, with the weights of before, in the student's own modules.

What the student does not train is shared. What it trains is kept a second time, in the model's dtype and of this rank
alone. For the time of a pass those copies are the parameters' data, and no layer is converted:

    modules, hooks, groups, schedules of the base       the student's
    parameters that train, all buffers                  the copies
    mode, random numbers, who records                   put back afterwards

DeepSpeed does not see the pass: it goes past the model's own hooks, where timers and calibration begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from torch import nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.trace.recorder import SILENT

T = TypeVar("T")


class Teacher:
    """The source of an engine's model, as it is now: made before a checkpoint of the student is loaded.

    Args:
        engine: DeepSpeed's, of a model that `conversion` belongs to. ZeRO 1 or 2, or none.
        conversion: of the model.

    Attributes:
        copied_bytes: of this rank.

    Raises:
        ScMoEConfigError: ZeRO-3, whose parameters are in pieces.
    """

    def __init__(self, engine: Any, conversion: Conversion) -> None:
        self.engine, self.conversion, self.model = engine, conversion, engine.module
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise ScMoEConfigError(
                "zero_optimization.stage = 3: a teacher in memory shares whole parameters with its student; set stage "
                "1 or 2, or distil from stored logits (scmoe.adapt.distill.teacher_logits)"
            )
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._frozen = [(each, each.detach().clone()) for each in (*trained, *self.model.buffers())]

    @property
    def copied_bytes(self) -> int:
        return sum(copy.nbytes for _, copy in self._frozen)

    def run(self, forward: Callable[[], T]) -> T:
        """Runs a forward pass as the source, without gradients. Collective, like a pass of the model.

        Args:
            forward: calls the model's `forward`, or other methods of it, directly.
        """
        with self.in_place(), as_source(self.engine, self.conversion):
            return forward()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the parameters' data are the copies; afterwards the very tensors of before."""
        live = [each.data for each, _ in self._frozen]
        try:
            for each, copy in self._frozen:
                each.data = copy
            yield
        finally:
            for (each, _), data in zip(self._frozen, live, strict=True):
                each.data = data


@contextmanager
def as_source(engine: Any, conversion: Conversion) -> Iterator[None]:
    """Passes within the block are evaluations of the unconverted model, with the weights that it has. Nothing that a
    training pass leaves or finds is changed: modes, random numbers, recorders, statistics in Python objects."""
    model: nn.Module = engine.module
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
        stack.enter_context(_in_evaluation(model))
        stack.enter_context(_unrecorded(engine.overlap.pairs))
        stack.enter_context(conversion.as_source())
        stack.enter_context(autocast_if_enabled(engine))
        torch.clear_autocast_cache()  # its casts are known by parameter, not by data
        stack.callback(torch.clear_autocast_cache)
        yield


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _unrecorded(pairs: Sequence[Any]) -> Iterator[None]:
    recorders = [pair.recorder for pair in pairs]
    for pair in pairs:
        pair.recorder = SILENT
    try:
        yield
    finally:
        for pair, recorder in zip(pairs, recorders, strict=True):
            pair.recorder = recorder
