"""The paper's figure in one loop: run a pair's backbone, with its routed experts at the place a schedule names.

Read `run` first. A pair is a run of Transformer blocks that ends in one with an MoE. It says where its shortcut is
taken, which operators follow (its backbone) and how it joins the two; everything about *when* is here.
Only communication overlaps: all computation stays on one stream, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scmoe_ds.overlap.schedule import Schedule


@dataclass(frozen=True)
class Stream:
    """What the backbone carries from operator to operator.

    Attributes:
        hidden: the residual stream, [B, S, D].
        moe_input: the current layer's normalised input of shared expert and merge, [B, S, D], once it exists.
        shared: the shared expert's output, [B, S, D], once it is computed.
    """

    hidden: Tensor
    moe_input: Tensor | None = None
    shared: Tensor | None = None


@dataclass(frozen=True)
class Operator:
    """One named step of the backbone: "attention", "mlp" or "shared"."""

    name: str
    run: Callable[[Stream], Stream]


class Routed(Protocol):
    """Routed tokens in flight, as `ScMoE.begin` returns them."""

    def send(self) -> None:
        """Launches the dispatch, if that was left to a later moment."""

    def run_experts(self) -> None:
        """Waits for the dispatch, computes, launches the combine."""


@dataclass(frozen=True)
class PairOutput:
    """hidden [B, S, D]; the load-balancing loss (scalar); tokens per expert before drops [E]."""

    hidden: Tensor
    l_aux: Tensor
    exp_counts: Tensor


class Pair(Protocol):
    """What the executor asks of a run of blocks."""

    def before_tap(self, hidden: Tensor) -> Tensor:
        """Runs the operators that precede the shortcut."""

    def begin(self, tap: Tensor, blocking: bool) -> Routed:
        """Normalises the tapped value, gates, encodes, and sends the tokens on their way."""

    def backbone(self) -> Sequence[Operator]:
        """The operators between shortcut and join, in order."""

    def join(self, routed: Routed, stream: Stream) -> PairOutput:
        """Waits for the combine, decodes, merges and adds the residual."""


def run(pair: Pair, hidden: Tensor, schedule: Schedule) -> PairOutput:
    """One forward pass of a pair under any schedule; its backward mirrors it by itself (see all_to_all.py).

    Raises:
        ValueError: a slot beyond the backbone.
    """
    hidden = pair.before_tap(hidden)
    # Gate and encode go as early as possible, decode (in join) as late as possible: both windows are then longest.
    routed = pair.begin(hidden, blocking=not schedule.overlap)
    stream, operators = Stream(hidden), pair.backbone()
    if schedule.expert_slot > len(operators) + 1:
        raise ValueError(f"expert_slot {schedule.expert_slot}: the backbone has {len(operators)} operators")
    for slot, operator in enumerate(operators, start=1):
        if slot == schedule.expert_slot:
            routed.run_experts()
        stream = operator.run(stream)
        # A GPU has the first operator to work on by now, while the host waits for the row counts to send by.
        routed.send()
    if schedule.expert_slot == len(operators) + 1:
        routed.run_experts()
    return pair.join(routed, stream)
