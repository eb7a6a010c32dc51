"""What an engine's steps do for routers: biases move once per optimizer step, z-losses follow the model's loss, and
monitors get the loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.balance import BiasBalance
from scmoe_ds.moe.z_loss import ZLoss, follow
from scmoe_ds.parallel.agreement import from_rank_zero


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


class LoadMonitor:
    """Writes to DeepSpeed's monitors how uneven the loads of AutoEP's layers are.

    `Train/Experts/layer_<n>_max_over_mean` is the fullest expert's tokens against the mean, of all ranks and since the
    last time. This package's own models have their loads in the log.

    Args:
        engine: its monitors are enabled; every rank makes one.
        layers: with AutoEP's buffer `tokens_per_expert`.
        interval: optimizer steps, the JSON's "steps_per_print".
    """

    def __init__(self, engine: Any, layers: Sequence[Any], interval: int) -> None:
        self.engine, self.layers, self.interval = engine, layers, interval
        self._before = self._counts()
        step = engine.step

        def step_and_write(*args: Any, **kwargs: Any) -> Any:
            at_boundary = engine.is_gradient_accumulation_boundary()
            result = step(*args, **kwargs)
            if at_boundary and engine.global_steps % interval == 0:
                self._write()
            return result

        engine.step = step_and_write

    def _counts(self) -> Tensor:
        return torch.cat([layer.tokens_per_expert.double() for layer in self.layers])

    def _write(self) -> None:
        now = self._counts()
        since, self._before = now - self._before, now
        dist.all_reduce(since)
        if dist.get_rank() > 0:
            return
        parts = since.split([len(layer.tokens_per_expert) for layer in self.layers])
        uneven = [float(part.max() / part.mean().clamp(min=1e-9)) for part in parts]
        names = [f"Train/Experts/layer_{number}_max_over_mean" for number in range(len(uneven))]
        samples = self.engine.global_samples
        self.engine.monitor.write_events([(name, value, samples) for name, value in zip(names, uneven, strict=True)])


def monitor_loads(engine: Any, layers: Sequence[Any]) -> None:
    """Starts a `LoadMonitor` where rank 0 has monitors. Collective."""
    if from_rank_zero(lambda: bool(engine.monitor.enabled)):
        LoadMonitor(engine, layers, engine.steps_per_print() or 10)


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
