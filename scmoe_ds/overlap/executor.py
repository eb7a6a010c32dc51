"""The paper's figure in one loop: a pair's backbone, and its routed experts beside it.

    tap ─► begin ──── dispatch ────► [experts] ──── combine ────► join
     │                                                             │
     └──► mlp ──► attention ──► shared ────────────────────────────┘      the backbone

Read `run` first. A pair is a few Transformer blocks, the last of which has an MoE. It says where its shortcut is taken
(the tap), which operators follow (its backbone) and how the two are joined. The schedule says before which operator the
experts run. Only communication overlaps: all computation stays on one stream, in one order.

With a late join the combine goes on while the next pair begins. Its place is in that pair's list of operators:

    … shared ──► attention ──► join ──► mlp …
          combine ───────────► (late)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import SILENT, PairRecorder


class Activations(NamedTuple):
    """What the backbone carries from operator to operator.

    Attributes:
        hidden: the residual stream, [B, S, D].
        moe_input: the current layer's normalised input, [B, S, D], which shared expert and merge read, once it exists.
        shared: the shared expert's output, [B, S, D], once it is computed.
        shared_inner: the shared expert's inner activation, [B, S, F], between its two halves, where it is split.
    """

    hidden: Tensor
    moe_input: Tensor | None = None
    shared: Tensor | None = None
    shared_inner: Tensor | None = None


Step = Callable[[Activations], Activations]


@dataclass(frozen=True)
class Operator:
    """One step of a pair. Operators are equal when kind, number and side of the tap are, whatever they run.

    Attributes:
        kind: "attention", "mlp", "norm", "shared", or "shared in" and "shared out"; a hooked pair has names of modules.
        number: which of its kind it is on its side of the tap, from 1.
        before_tap: whether the shortcut is taken after it; False for the operators of the backbone.
        run: what it does.
        before_join: whether what the preceding pair has left on its way joins right after it.
    """

    kind: str
    number: int
    before_tap: bool
    run: Step = field(compare=False, repr=False)
    before_join: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        """Its name in logs, traces and files: "mlp", "attention 2", "attention before tap"."""
        before, number = " before tap" * self.before_tap, f" {self.number}" * (self.number > 1)
        return f"{self.kind}{before}{number}"


def numbered(steps: Iterable[tuple[str, Step]], tap: int, join: int = 1) -> list[Operator]:
    """Makes operators of (kind, run), in order; the first `tap` of them come before the tap.

    Args:
        join: behind how many of them the preceding pair's routed output joins, if it comes late.
    """
    seen: Counter[tuple[str, bool]] = Counter()
    operators = []
    for index, (kind, run) in enumerate(steps):
        side = kind, index < tap
        seen[side] += 1
        operators.append(Operator(kind, seen[side], index < tap, run, index + 1 == join))
    return operators


class RoutedTokens(Protocol):
    """Routed tokens in flight, as `ScMoE.begin` returns them."""

    def send(self) -> None:
        """Launches the dispatch, if that was left to a later moment."""

    def run_experts(self) -> None:
        """Waits for the dispatch of the next chunk, computes, launches its combine."""


class PairOutput(NamedTuple):
    """hidden [B, S, D]; the load-balancing loss (scalar); tokens per expert before drops [E]; what joins late.

    A tuple, because a pair is a module: hooks of torch and DeepSpeed find tensors in tuples, not in dataclasses.
    `late` waits for the combine and adds the routed output to the stream of the next pair; None: `hidden` has it.
    """

    hidden: Tensor
    l_aux: Tensor
    exp_counts: Tensor
    late: Step | None = None


class Backbone(Protocol):
    """Operators, and among them the tap."""

    def operators(self) -> Sequence[Operator]:
        """All operators in order, as `numbered` makes them; the backbone are those behind the tap."""


class Pair(Backbone, Protocol):
    """What the executor asks of a pair."""

    def begin(
        self, activations: Activations, used_token: Tensor | None, schedule: Schedule, recorder: PairRecorder
    ) -> RoutedTokens:
        """Normalises the tapped value, gates, encodes, and sends the tokens on their way."""

    def join(self, routed: Any, activations: Activations) -> PairOutput:
        """Waits for the combine, decodes, merges and adds the residual; or returns all this as `late`."""


class Interleaving:
    """The routed experts of one forward pass, run between the operators of the backbone as a schedule says.

    Around every operator, in order: `before` its slot, and `after` it. At the end: `rest`. The loop of `run` makes
    these calls. In a model that somebody else wrote, hooks make them (replace/hooked.py).
    """

    def __init__(self, routed: RoutedTokens, schedule: Schedule) -> None:
        self._routed, self._slots = routed, list(schedule.slots)

    def before(self, slot: float) -> None:
        """Runs the experts on the chunks whose slot has come."""
        while self._slots and self._slots[0] <= slot:
            del self._slots[0]
            self._routed.run_experts()

    def after(self) -> None:
        """Sends the tokens, if `begin` has left that to a later moment.

        A GPU has the first operator to work on by now, while the host waits for the row counts to send by.
        """
        self._routed.send()

    def rest(self) -> None:
        """Runs the experts on all chunks that are left."""
        self.before(math.inf)


def run(
    pair: Pair,
    hidden: Tensor,
    schedule: Schedule,
    recorder: PairRecorder = SILENT,
    used_token: Tensor | None = None,
    late: Step | None = None,
) -> PairOutput:
    """One forward pass of a pair under any schedule; its backward mirrors it by itself (see comm/all_to_all.py).

    Args:
        hidden: [B, S, D].
        used_token: [B, S], zero for tokens that go to no routed expert; None: all tokens do.
        late: of the preceding pair's output.

    Raises:
        ValueError: a slot beyond the backbone.
    """
    operators = pair.operators()
    before_tap = [operator for operator in operators if operator.before_tap]
    after_tap = operators[len(before_tap) :]
    if schedule.slots[-1] > len(after_tap) + 1:
        raise ValueError(f"expert_slot {schedule.expert_slot}: the backbone has {len(after_tap)} operators")
    activations = Activations(hidden)
    for operator in before_tap:
        activations = _step(operator, activations, recorder, late)
    # Gate and encode go as early as possible, decode (in join) as late as possible: both windows are then longest.
    routed = pair.begin(activations, used_token, schedule, recorder)
    experts = Interleaving(routed, schedule)
    for slot, operator in enumerate(after_tap, start=1):
        experts.before(slot)
        activations = _step(operator, activations, recorder, late)
        experts.after()
    experts.rest()
    return pair.join(routed, activations)


def backbone(pair: Backbone) -> list[Operator]:
    """The operators between shortcut and join."""
    return [operator for operator in pair.operators() if not operator.before_tap]


def _step(operator: Operator, activations: Activations, recorder: PairRecorder, late: Step | None) -> Activations:
    leaving = operator.run(Activations(*recorder.open(operator, *activations)))
    leaving = Activations(*recorder.close(operator, *leaving))
    return late(leaving) if late is not None and operator.before_join else leaving
