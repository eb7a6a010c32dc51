"""The optimizer's and the schedule's settings of this run, in an engine into which a checkpoint has been loaded.

A loader replaces what DeepSpeed made of the JSON (learning rate, betas, weight decay, clipping, loss scale) by the
checkpoint's. A user who lowers the learning rate and resumes wants the JSON's.
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
    """What an engine was built with; made before a checkpoint is loaded.

    Args:
        engine: DeepSpeed's, before its first step.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, optimizer = engine, engine.optimizer
        self._inner = getattr(optimizer, "optimizer", optimizer)
        defaults = getattr(self._inner, "defaults", {})
        # Each group's own: biases and norms have no weight decay.
        self._groups = [
            {key: copy.deepcopy(group[key]) for key in defaults if key in group} for group in self._groups_now
        ]
        self._clip_grad = getattr(optimizer, "clip_grad", None)
        self._loss_scale = {
            key: copy.deepcopy(getattr(optimizer, key)) for key in _LOSS_SCALE if hasattr(optimizer, key)
        }

    @property
    def _groups_now(self) -> list[dict[str, Any]]:
        return getattr(self._inner, "param_groups", [])

    @property
    def learning_rate(self) -> float | None:
        """The engine's, for the next step."""
        return float(self._groups_now[0]["lr"]) if self._groups_now else None

    def put_back_clipping(self) -> None:
        """Restores the norm that gradients are clipped to."""
        if self._clip_grad is not None:
            self._engine.optimizer.clip_grad = self._clip_grad

    def put_back_loss_scale(self) -> None:
        """Restores fp16's loss scale, fixed or dynamic, as at a start."""
        for key, value in self._loss_scale.items():
            setattr(self._engine.optimizer, key, value)

    def put_back_optimizer(self, saved_schedule: Mapping[str, Any] | None) -> None:
        """Restores learning rate, betas, weight decay, …; then puts this run's schedule at the step that the engine
        has reached. The scheduler must not have loaded a state.

        Args:
            saved_schedule: the state of the checkpoint's scheduler; None: there was none.
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
        """Converts a state that another implementation of the same optimizer saved (torch's Adam, DeepSpeed's on GPU or
        CPU): adds the settings that only this one has, and counts steps as it does. torch counts in tensors; an integer
        would stay as it is, so that every step would be corrected for the bias of the first."""
        for group, own in zip(self._groups_now, self._groups, strict=True):
            group.update({key: value for key, value in own.items() if key not in group})
        package = type(self._inner).__module__.split(".")[0]
        for state in getattr(self._inner, "state", {}).values():
            step = state.get("step")
            if package == "torch" and isinstance(step, int):
                state["step"] = torch.tensor(float(step))
            elif package == "deepspeed" and isinstance(step, torch.Tensor):
                state["step"] = int(step)
