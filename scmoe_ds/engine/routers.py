"""What an engine's steps do for routers: biases move once per optimizer step, z-losses follow the model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.balance import BiasBalance
from scmoe_ds.moe.z_loss import ZLoss, follow


def serve_routers(engine: Any) -> None:
    """Sets up the routers of an engine's model, once: those of gates, and of AutoEP's layers."""
    parts = [each for module in engine.module.modules() for each in vars(module).values()]
    if balances := [each for each in parts if isinstance(each, BiasBalance)]:
        move_after_steps(engine, balances)
    if z_losses := [each for each in parts if isinstance(each, ZLoss)]:
        follow_loss(engine.module, z_losses)


def move_after_steps(engine: Any, balances: Sequence[BiasBalance]) -> None:
    """Every optimizer step of the engine moves the biases by the tokens of its micro-batches on all ranks. One
    all-reduce serves all layers. A step that fp16 skips moves nothing."""
    step = engine.step

    def step_and_move(*args: Any, **kwargs: Any) -> Any:
        at_boundary = engine.is_gradient_accumulation_boundary()
        result = step(*args, **kwargs)
        if at_boundary:
            _move(balances, engine.was_step_applied())
        return result

    engine.step = step_and_move


def _move(balances: Sequence[BiasBalance], applied: bool) -> None:
    counts = [balance.take() for balance in balances]
    if not applied:
        return
    # Tensor-parallel ranks count the same tokens each, which changes no share.
    joint = torch.cat(counts)
    dist.all_reduce(joint)
    for balance, of_layer in zip(balances, joint.split([len(each) for each in counts]), strict=True):
        balance.update(of_layer)


def follow_loss(model: nn.Module, z_losses: Sequence[ZLoss]) -> None:
    """Lets z-losses follow the loss that the model's forward pass returns."""

    def followed(module: nn.Module, args: Any, output: Any) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return output
        loss = _loss_of(output)
        if loss is None or not loss.requires_grad:
            raise ScMoEConfigError(
                "scmoe.router.z_loss_coefficient: the model returned no loss, whose weight the z-loss shares; hand it "
                "labels, or remove the coefficient"
            )
        return _with_loss(output, follow(loss, z_losses))

    model.register_forward_hook(followed)


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.numel() == 1 else None
    found = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, "loss", None)
    if found is None and isinstance(output, dict):
        found = output.get("loss")
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, (tuple, list)):
        return type(output)([loss, *output[1:]])
    output["loss"] = loss  # a dict, or transformers' ModelOutput, which is one
    return output
