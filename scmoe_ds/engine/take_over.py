"""Lets those who call `deepspeed.initialize` themselves, such as Trainer and Accelerate, get `scmoe_ds.initialize`.

The engine is then made with everything that the "scmoe" section says: layers are replaced, experts get parameter groups
of their own, schedules are timed. A JSON without the section goes to DeepSpeed as ever.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import deepspeed
import torch
from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.config.unread_section import is_read
from scmoe_ds.engine.client_optimizer import follow_groups
from scmoe_ds.engine.initialize import initialize
from scmoe_ds.engine.taught_model import share_of_tokens
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.parallel.output import log
from scmoe_ds.replace.upcycle import MoEFeedForward, load_balancing_loss

_engines: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_takes_over = False


@contextmanager
def engines_are_ours() -> Iterator[None]:
    """Inside the block, `deepspeed.initialize` is `scmoe_ds.initialize` for a JSON with a "scmoe" section."""
    before = take_over(True)
    try:
        yield
    finally:
        take_over(before)


def take_over(takes_over: bool) -> bool:
    """The same from here on, or no longer; returns how it was."""
    global _takes_over
    if not hasattr(deepspeed.initialize, "taken_over_by_scmoe"):
        deepspeed.initialize = _in_front_of(deepspeed.initialize)
    before, _takes_over = _takes_over, takes_over
    return before


def engine_of(model: nn.Module) -> Any:
    """The engine that was made of a model in the place of `deepspeed.initialize`; None: there is none."""
    return _engines.get(model)


def prepare(accelerator: Any, *objects: Any) -> Any:
    """As `accelerator.prepare`, with what the "scmoe" section of Accelerate's DeepSpeed JSON says.

    In training the loss of a model of `moe_from_dense` has its balancing loss in it, times `aux_loss_coefficient`.

    Args:
        accelerator: an `accelerate.Accelerator` with a DeepSpeed plugin.
        objects: model, optimizer, loaders and scheduler. Experts get parameter groups of their own in the optimizer,
            and the scheduler follows.

    Returns:
        the prepared objects, in their order.

    Raises:
        ScMoEConfigError: as `scmoe_ds.initialize`, or Accelerate has made no engine with a section.
    """
    with engines_are_ours():
        prepared = accelerator.prepare(*objects)
    if not any(isinstance(each, nn.Module) and each in _engines for each in objects):
        raise ScMoEConfigError(
            'prepare: Accelerate has made no DeepSpeed engine with a "scmoe" section; hand over the model, and give '
            "Accelerator a DeepSpeed plugin whose JSON has that section (Accelerator(cpu=True) takes no DeepSpeed)"
        )
    for each in objects:
        if isinstance(each, torch.optim.lr_scheduler.LRScheduler):
            follow_groups(each)
    return prepared


def _in_front_of(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_either(*args: Any, **kwargs: Any) -> Any:
        whole = kwargs.get("config") if kwargs.get("config") is not None else kwargs.get("config_params")
        if not _takes_over or is_read() or not isinstance(whole, Mapping) or "scmoe" not in whole:
            return original(*args, **kwargs)
        result = initialize(*args, **kwargs)
        model = result[0].module
        is_new, _engines[model] = model not in _engines, result[0]
        if is_new and any(isinstance(module, MoEFeedForward) for module in model.modules()):
            coefficient = ScMoEConfig.from_deepspeed(whole).aux_loss_coefficient
            model.register_forward_hook(_WithBalancingLoss(coefficient), with_kwargs=True)
        return result

    initialize_either.taken_over_by_scmoe = True  # type: ignore[attr-defined]
    return initialize_either


class _WithBalancingLoss:
    """A hook on a model: in training, its loss has the balancing loss of its MoE layers in it."""

    def __init__(self, coefficient: float) -> None:
        self._coefficient, self._has_warned = coefficient, coefficient == 0

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return output
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            self._warn(type(output).__name__)
            return output
        share = share_of_tokens(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        output["loss"] = loss + self._coefficient * share * load_balancing_loss(model)
        return output

    def _warn(self, kind: str) -> None:
        if not self._has_warned:
            log(
                f"the balancing loss is not added: the model's output ({kind}) has no loss in it, as with label "
                "smoothing or a loss function of your own; add aux_loss_coefficient * "
                "scmoe_ds.load_balancing_loss(model) there",
                level=logging.WARNING,
            )
            self._has_warned = True
