"""An AutoEP layer's own pair: the model's mathematics, with the overlap that it allows.

    begin: router, dispatch in flight │ shared experts │ join: combine, sum        the operators are the shared experts

A layer without shared experts has no operator: its chunks hide behind each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scmoe_ds.config.messages import counted
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap.executor import Activations, Operator, PairOutput, backbone, numbered
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.auto import first_schedule
from scmoe_ds.planner.times import LateWindow
from scmoe_ds.trace.recorder import SILENT, PairRecorder


class AsIsPair:
    """An `executor.Pair` that runs inside of its layer's forward.

    Args:
        layer: a `replace.autoep.ScheduledAutoEP`.
        overlap: the section's "overlap".

    Attributes:
        schedule, forward_schedule, recorder: as those of models.pairs.StagedPair.

    Raises:
        ScMoEConfigError: a slot behind the last operator.
    """

    late_window: LateWindow | None = None

    def __init__(self, layer: Any, overlap: OverlapConfig) -> None:
        self.layer = layer
        self.recorder: PairRecorder = SILENT
        self.forward_schedule: Schedule | None = None
        operators = backbone(self)
        self.schedule = first_schedule(overlap, self.costs())
        if self.schedule.slots[-1] > len(operators) + 1:
            names = ", ".join(operator.label for operator in operators) or "none"
            raise ScMoEConfigError(
                f"scmoe.overlap.expert_slot = {overlap.expert_slot}: the backbone of {layer.name} has "
                f"{counted(len(operators), 'operator')} ({names}); use 1 … {len(operators) + 1}"
            )

    def schedule_now(self) -> Schedule:
        """The schedule of a pass that begins now."""
        training = torch.is_grad_enabled() or self.forward_schedule is None
        return self.schedule if training else self.forward_schedule  # type: ignore[return-value]  # not None there

    def operators(self) -> list[Operator]:
        """The shared experts, if the layer has any."""
        return numbered([] if self.layer.shared_experts is None else [("shared", self._shared)], 0)

    def costs(self) -> list[float]:
        """Of the backbone's operators, in any common unit."""
        return [1.0] * len(backbone(self))

    def facts(self) -> dict[str, Any]:
        """What this pair's times depend on, beside its MoE layer; JSON values."""
        parameters = sum(getattr(each, "ds_numel", each.numel()) for each in self.layer.parameters())
        return {"operators": [each.label for each in self.operators()], "parameters": parameters}

    def begin(
        self, activations: Activations, used_token: Tensor | None, schedule: Schedule, recorder: PairRecorder
    ) -> Any:
        """Router, encode, dispatch in flight."""
        how = {"blocking": not schedule.overlap, "num_chunks": schedule.num_chunks, "recorder": recorder}
        return self.layer.begin(activations.hidden, used_token, **how)

    def join(self, routed: Any, activations: Activations) -> PairOutput:
        """Waits for the combine; the sum is the layer's output."""
        return PairOutput(*self.layer.finish(routed, activations.hidden, activations.shared))

    def _shared(self, activations: Activations) -> Activations:
        return activations._replace(shared=self.layer.shared(activations.hidden))
