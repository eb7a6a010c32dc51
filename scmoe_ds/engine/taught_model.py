"""Hooks on a model that others wrote: in training, the loss in its output is that of self-distillation.

    before its pass    the teacher's, on the same inputs
    after it           output["loss"] = share · (α τ² KL + γ match) + β (loss - balancing) + balancing

`loss` is the model's own, of its labels, and `balancing` what transformers' MoE models have added to it. `share` is 1,
or this micro-batch's share of the tokens where Trainer divides by those of all micro-batches (num_items_in_batch).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.distill import Distillation
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel.output import log


def teach_model(engine: Any, conversion: Conversion, section: ScMoEConfig) -> None:
    """Makes `engine.distill`, if the section asks for it, and registers the hooks.

    They come before all others: the calibration does not time the teacher, and z-losses follow the loss that is
    minimised.

    Raises:
        ScMoEConfigError: nothing that could be taught, or a setting that the model cannot have.
    """
    distill = None if section.adapt is None else section.adapt.distill
    if distill is None:
        return
    if not conversion.numbers:
        raise ScMoEConfigError(
            "scmoe.adapt.distill: no MoE layer of the model is converted, and it would be its own teacher; remove it"
        )
    if distill.teacher_logits is not None:
        raise ScMoEConfigError(
            f"scmoe.adapt.distill.teacher_logits = {json.dumps(distill.teacher_logits)}: logits are kept by the "
            "numbers of scmoe pretrain's samples, and your own loop has none; remove it, and the teacher is in memory"
        )
    engine.distill = Distillation(engine, conversion, section)
    if (distill.alpha, distill.beta, distill.gamma) == (0, 1, 0):
        return
    hooks = _Hooks(engine.distill)
    engine.module.register_forward_pre_hook(hooks.before, prepend=True, with_kwargs=True)
    engine.module.register_forward_hook(hooks.after, prepend=True, with_kwargs=True)


def share_of_tokens(labels: Tensor | None, items: Any) -> Any:
    """This micro-batch's share of the tokens of all. Trainer adds up the losses of micro-batches over all their tokens,
    so that a loss which is a mean by itself is weighed by them.

    Args:
        labels: [B, S], -100 where no loss is computed.
        items: `num_items_in_batch`; None: the loss is a mean.
    """
    return 1 if items is None or labels is None else (labels[..., 1:] != -100).sum() / items


class _Hooks:
    def __init__(self, distillation: Distillation) -> None:
        self._distillation, self._has_warned = distillation, False

    def before(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self._warn_of_unused()
            self._distillation.begin(*args, **kwargs)

    def after(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()) or not isinstance(output, dict):
            return output
        loss, labels = output.get("loss"), kwargs.get("labels")
        if loss is None or labels is None:
            return output
        share, balancing = share_of_tokens(labels, kwargs.get("num_items_in_batch")), _balancing(model, output)
        if isinstance(share, Tensor):
            share = share.clamp(min=torch.finfo(torch.float32).tiny)  # a micro-batch of padding alone
        mask = torch.zeros_like(labels)
        mask[..., :-1] = labels[..., 1:] != -100
        total = self._distillation.loss(output["logits"], mask, (loss - balancing) / share)
        output["loss"] = share * total + balancing
        return output

    def _warn_of_unused(self) -> None:
        if self._distillation.is_pending and not self._has_warned:
            self._has_warned = True
            log(
                "the distillation loss of the last training pass was not used: hand labels to the model, or call "
                "engine.distill.loss(outputs.logits, loss_mask=…, lm=…) for a loss of your own",
                level=logging.WARNING,
            )


def _balancing(model: nn.Module, output: Mapping[str, Any]) -> Any:
    """What a MoE model of transformers has added to its loss."""
    of_output = output.get("aux_loss")
    if not isinstance(of_output, Tensor):
        return 0.0
    default = getattr(getattr(model, "config", None), "router_aux_loss_coef", 0.0)
    return getattr(model, "router_aux_loss_coef", default) * of_output
