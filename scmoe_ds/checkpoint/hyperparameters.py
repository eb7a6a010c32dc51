"""Puts this run's optimizer and schedule settings back after a checkpoint has been loaded.

A loader replaces the JSON's learning rate, betas, weight decay, clipping and loss scale with the checkpoint's. When a
user lowers the learning rate and resumes, the JSON's value must hold.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch

_LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "loss_scale_config")
"""Attributes of DeepSpeed's optimizers."""


class OwnSettings:
    """The settings that an engine was built with. Make it before a checkpoint is loaded.

    Args:
        engine: DeepSpeed's, before its first step.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, optimizer = engine, engine.optimizer
        self._inner = getattr(optimizer, "optimizer", optimizer)
        defaults = getattr(self._inner, "defaults", {})
        # Each group's own: biases and norms have no weight decay.
        own = [{key: group[key] for key in defaults if key in group} for group in self._groups_now]
        self._groups = copy.deepcopy(own)
        self._clip_grad = getattr(optimizer, "clip_grad", None)
        scale = {key: getattr(optimizer, key) for key in _LOSS_SCALE if hasattr(optimizer, key)}
        self._loss_scale = copy.deepcopy(scale)

    @property
    def _groups_now(self) -> list[dict[str, Any]]:
        return getattr(self._inner, "param_groups", [])

    @property
    def learning_rate(self) -> float | None:
        """The engine's learning rate for the next step."""
        return float(self._groups_now[0]["lr"]) if self._groups_now else None

    def put_back_clipping(self) -> None:
        """Restores the gradient clipping norm."""
        if self._clip_grad is not None:
            self._engine.optimizer.clip_grad = self._clip_grad

    def put_back_loss_scale(self) -> None:
        """Restores fp16's loss scale, fixed or dynamic, as at the start of a run."""
        for key, value in self._loss_scale.items():
            setattr(self._engine.optimizer, key, value)

    def put_back_optimizer(self, saved_schedule: Mapping[str, Any] | None) -> None:
        """Restores learning rate, betas, weight decay and so on, and moves this run's schedule to the engine's step.

        Args:
            saved_schedule: the state of the checkpoint's scheduler, which this run's must not have loaded; or None.
        """
        for group, own in zip(self._groups_now, self._groups, strict=True):
            group.update(own)
        scheduler = self._engine.lr_scheduler
        if scheduler is None:
            return
        steps = self._engine.global_steps - self._engine.skipped_steps
        if hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed's own: a function of the step
            position = (saved_schedule or {}).get("last_batch_iteration", steps - 1)
            if position >= 0:
                scheduler.step(position)
            return
        with warnings.catch_warnings():  # torch's: each step follows from the one before
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(steps):
                scheduler.step()

    def fit_implementation(self) -> None:
        """Converts a state that another implementation of the same optimizer saved (torch's Adam, or DeepSpeed's on GPU
        or CPU). Adds the settings that only this implementation has, and counts steps in its type: torch would never
        increase an integer, and would correct the bias of every step like that of the first."""
        for group, own in zip(self._groups_now, self._groups, strict=True):
            group.update({key: value for key, value in own.items() if key not in group})
        package = type(self._inner).__module__.split(".")[0]
        for state in getattr(self._inner, "state", {}).values():
            step = state.get("step")
            if package == "torch" and isinstance(step, int):
                state["step"] = torch.tensor(float(step))
            elif package == "deepspeed" and isinstance(step, torch.Tensor):
                state["step"] = int(step)
