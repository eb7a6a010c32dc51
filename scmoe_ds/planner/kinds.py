"""The pairs of a model as the calibrator sees them, sorted into kinds that share their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from scmoe_ds.moe.stages import StagedLayer
from scmoe_ds.overlap.executor import Backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.calibration_file import Description
from scmoe_ds.planner.plan import Plan
from scmoe_ds.planner.simulation import Mode
from scmoe_ds.planner.times import LateWindow, OperatorTimes
from scmoe_ds.trace.recorder import PairRecorder


class ScheduledPair(Backbone, Protocol):
    """What the calibrator asks of a pair; see models.pairs.StagedPair and replace.hooked.HookedPair."""

    late_window: LateWindow | None
    schedule: Schedule
    forward_schedule: Schedule | None
    recorder: PairRecorder

    @property
    def layer(self) -> StagedLayer:
        """The pair's MoE layer."""

    def facts(self) -> dict[str, Any]:
        """What the pair's times depend on, beside its MoE layer; JSON values."""


@dataclass
class Kind:
    """Pairs that agree in all that their times depend on, and so share their times.

    Attributes:
        description: all that the times depend on, as JSON values.
        layers: numbers of these pairs' MoE layers.
        times: None until they are known.
        plans: what follows from the times, by mode.
    """

    description: Description
    layers: list[int]
    times: OperatorTimes | None = None
    plans: dict[Mode, Plan] = field(default_factory=dict)


def kinds_of(descriptions: Sequence[Description]) -> list[Kind]:
    """Pairs whose descriptions are equal are of one kind."""
    kinds: list[Kind] = []
    for layer, description in enumerate(descriptions):
        if description not in [kind.description for kind in kinds]:
            kinds.append(Kind(description, []))
        next(kind for kind in kinds if kind.description == description).layers.append(layer)
    return kinds
