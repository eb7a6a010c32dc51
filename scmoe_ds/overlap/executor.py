"""The paper's figure in one loop: run a pair's backbone, with its routed experts at the place a schedule names.

Read `run` first. A pair is a run of Transformer blocks that ends in one with an MoE. It says where its shortcut is
taken, which operators follow (its backbone) and how it joins the two; everything about *when* is here.
Only communication overlaps: all computation stays on one stream, in one order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import SILENT, PairRecorder


@dataclass(frozen=True)
class Activations:
    """What the backbone carries from operator to operator.

    Attributes:
        hidden: the residual stream, [B, S, D].
        moe_input: the current layer's normalised input of shared expert and merge, [B, S, D], once it exists.
        shared: the shared expert's output, [B, S, D], once it is computed; between its two halves, where it is split,
            its inner activation [B, S, F].
    """

    hidden: Tensor
    moe_input: Tensor | None = None
    shared: Tensor | None = None


@dataclass(frozen=True)
class Operator:
    """One named step: "attention", "mlp", "shared", or "shared in" and "shared out"."""

    name: str
    run: Callable[[Activations], Activations]


class Routed(Protocol):
    """Routed tokens in flight, as `ScMoE.begin` returns them."""

    def send(self) -> None:
        """Launches the dispatch, if that was left to a later moment."""

    def run_experts(self) -> None:
        """Waits for the dispatch of the next chunk, computes, launches its combine."""


class PairOutput(NamedTuple):
    """hidden [B, S, D]; the load-balancing loss (scalar); tokens per expert before drops [E].

    A tuple, because a run is a module: hooks of torch and DeepSpeed find tensors in tuples, not in dataclasses.
    """

    hidden: Tensor
    l_aux: Tensor
    exp_counts: Tensor


class Backbone(Protocol):
    """Operators by name, and where among them the shortcut is taken."""

    tap: int

    def operators(self) -> Sequence[Operator]:
        """All operators in order; the shortcut is taken before number `tap` (from 0), the backbone begins there."""


class Pair(Backbone, Protocol):
    """What the executor asks of a run of blocks."""

    def begin(self, activations: Activations, schedule: Schedule, recorder: PairRecorder) -> Routed:
        """Normalises the tapped value, gates, encodes, and sends the tokens on their way."""

    def join(self, routed: Routed, activations: Activations) -> PairOutput:
        """Waits for the combine, decodes, merges and adds the residual."""


def run(pair: Pair, hidden: Tensor, schedule: Schedule, recorder: PairRecorder = SILENT) -> PairOutput:
    """One forward pass of a pair under any schedule; its backward mirrors it by itself (see all_to_all.py).

    Raises:
        ValueError: a slot beyond the backbone.
    """
    operators = _distinct(pair.operators(), pair.tap)
    before_tap, backbone = operators[: pair.tap], operators[pair.tap :]
    if schedule.slots[-1] > len(backbone) + 1:
        raise ValueError(f"expert_slot {schedule.expert_slot}: the backbone has {len(backbone)} operators")
    activations = Activations(hidden)
    for operator in before_tap:
        activations = _step(operator, activations, recorder)
    # Gate and encode go as early as possible, decode (in join) as late as possible: both windows are then longest.
    routed = pair.begin(activations, schedule, recorder)
    for slot, operator in enumerate(backbone, start=1):
        for _ in range(schedule.chunks_at(slot)):
            routed.run_experts()
        activations = _step(operator, activations, recorder)
        # A GPU has the first operator to work on by now, while the host waits for the row counts to send by.
        routed.send()
    for _ in range(schedule.chunks_at(len(backbone) + 1)):
        routed.run_experts()
    return pair.join(routed, activations)


def backbone_names(pair: Backbone) -> list[str]:
    """Names of the operators between shortcut and join, as a recorder hears them."""
    return [operator.name for operator in _distinct(pair.operators(), pair.tap)[pair.tap :]]


def _step(operator: Operator, activations: Activations, recorder: PairRecorder) -> Activations:
    entering = Activations(*recorder.open(operator.name, activations.hidden, activations.moe_input, activations.shared))
    leaving = operator.run(entering)
    return Activations(*recorder.close(operator.name, leaving.hidden, leaving.moe_input, leaving.shared))


def _distinct(operators: Sequence[Operator], tap: int) -> list[Operator]:
    """Names by which spans can be told apart: a second "attention" becomes "attention 2"."""
    seen: Counter[str] = Counter()
    distinct = []
    for index, operator in enumerate(operators):
        name = operator.name if index >= tap else f"{operator.name} before tap"
        seen[name] += 1
        distinct.append(Operator(name if seen[name] == 1 else f"{name} {seen[name]}", operator.run))
    return distinct
