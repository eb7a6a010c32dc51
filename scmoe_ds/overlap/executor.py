"""The paper's figure in one loop: run a pair's backbone, with its routed experts at the place a schedule names.

Read `run` first. A pair is a run of Transformer blocks that ends in one with an MoE. It says where its shortcut is
taken, which operators follow (its backbone) and how it joins the two; everything about *when* is here.
Only communication overlaps: all computation stays on one stream, in one order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
    """One step of a pair. Operators are equal when kind, number and side of the tap are, whatever they run.

    Attributes:
        kind: "attention", "mlp", "norm", "shared", or "shared in" and "shared out"; a hooked pair has names of modules.
        number: which of its kind it is on its side of the tap, from 1.
        before_tap: whether the shortcut is taken after it; False for the operators of the backbone.
        run: what it does.
    """

    kind: str
    number: int
    before_tap: bool
    run: Callable[[Activations], Activations] = field(compare=False, repr=False)

    @property
    def label(self) -> str:
        """Its name in logs, traces and files: "mlp", "attention 2", "attention before tap"."""
        words = [self.kind, *(["before tap"] if self.before_tap else []), *([str(self.number)] * (self.number > 1))]
        return " ".join(words)


def numbered(steps: Iterable[tuple[str, Callable[[Activations], Activations]]], tap: int) -> list[Operator]:
    """Makes operators of (kind, run), in order; the first `tap` of them come before the tap."""
    seen: Counter[tuple[str, bool]] = Counter()
    operators = []
    for index, (kind, run) in enumerate(steps):
        side = kind, index < tap
        seen[side] += 1
        operators.append(Operator(kind, seen[side], index < tap, run))
    return operators


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
    """Operators, and where among them the shortcut is taken."""

    tap: int

    def operators(self) -> Sequence[Operator]:
        """All operators in order, as `numbered` makes them; the backbone begins at index `tap`."""


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
    operators = pair.operators()
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


def backbone(pair: Backbone) -> list[Operator]:
    """The operators between shortcut and join."""
    return list(pair.operators()[pair.tap :])


def _step(operator: Operator, activations: Activations, recorder: PairRecorder) -> Activations:
    label = operator.label
    entering = Activations(*recorder.open(label, activations.hidden, activations.moe_input, activations.shared))
    leaving = operator.run(entering)
    return Activations(*recorder.close(label, leaving.hidden, leaving.moe_input, leaving.shared))
