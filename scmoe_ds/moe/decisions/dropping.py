"""1T-Drop and 2T-Drop of DualSparse-MoE (arXiv 2508.18376): routed experts that hardly matter for a token are left out.

    criterion < skip       not computed, and no row is sent
    criterion < halve      the major half of the expert's neurons computes alone (2T-Drop)
    otherwise              the whole expert

The criterion of a choice is its score over the sum of the token's chosen scores. With one routed expert that is always
1; there it is the score itself, the probability before any renormalisation. The parts of an expert have the criterion
of the whole one. The weights stay as they are.

Shape suffixes: T tokens, K choices of a token, E experts, L local experts, P ranks, H halves (1 or 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scmoe_ds.moe.early import rerouted
from scmoe_ds.moe.gate import Routing


@dataclass(frozen=True)
class Thresholds:
    """Of a layer.

    Attributes:
        skip: a choice below it is not computed.
        halve: a choice below it is computed by the major half alone; `skip` for 1T-Drop.
    """

    skip: float
    halve: float


@dataclass(frozen=True)
class Places:
    """Where the rows of a choice go: to a whole expert, or to its major half.

    A rank has its whole experts first and then their major halves, so that each kind is computed together.

    Attributes:
        local_experts: L.
        halves: 2 where experts can be halved, otherwise 1, and a place is an expert.
    """

    local_experts: int
    halves: int

    @property
    def of_rank(self) -> int:
        """Places of a rank."""
        return self.local_experts * self.halves

    def of(self, expert_KT: Tensor, whole_KT: Tensor) -> Tensor:
        """[K, T] int64.

        Args:
            whole_KT: bool, whether the whole expert computes the choice.
        """
        if self.halves == 1:
            return expert_KT
        rank_KT = expert_KT.div(self.local_experts, rounding_mode="floor")
        return expert_KT + (rank_KT + ~whole_KT) * self.local_experts


class DropCounts:
    """What a rule has dropped so far. On a GPU the host does not wait for it before it is read.

    Args:
        device: of the tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._rows = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, before: Routing, after: Routing, places: Places) -> None:
        """Counts a routing."""
        halves_H = after.choices.rows_E.view(-1, places.halves, places.local_experts).sum((0, 2))
        self._rows[0] += before.choices.rows_E.sum()
        self._rows[1 : 1 + places.halves] += halves_H

    def read(self) -> tuple[int, int, int]:
        """Choices of all tokens; of these, computed by whole experts; computed by major halves. The host waits."""
        choices, whole, major = self._rows.tolist()
        return choices, whole, major

    def reset(self) -> None:
        """Counts from zero."""
        self._rows.zero_()


def criterion(routing: Routing) -> Tensor:
    """[K, T] fp32 how much each choice matters; see above.

    Raises:
        ValueError: the routing has no scores; see `facts` of `route`.
    """
    score_KT = routing.score_KT
    if score_KT is None:
        raise ValueError("routing.score_KT = None: dropping reads the scores; route with facts")
    if len(score_KT) == routing.parts:
        return score_KT
    chosen_T = score_KT.sum(0) / routing.parts  # each choice's score stands once for each part
    return score_KT / chosen_T


def drop(routing: Routing, skip: float | Tensor, halve: float | Tensor, places: Places, ranks: int) -> Routing:
    """The routing without the choices below the thresholds.

    A criterion that is not a number is below none: a token without any score keeps its experts.

    Args:
        skip, halve: of `Thresholds`, or [K, T] fp32 of each choice.
        ranks: among which the experts are divided.
    """
    criterion_KT, choices = criterion(routing), routing.choices
    kept_KT = ~(criterion_KT < skip)
    if choices.kept_KT is not None:
        kept_KT &= choices.kept_KT
    place_KT = places.of(choices.expert_KT, ~(criterion_KT < halve))
    return rerouted(routing, place_KT, kept_KT, ranks * places.of_rank)


class DropRule:
    """A routing rule: every rank uses the same thresholds (1T-Drop, 2T-Drop).

    Args:
        thresholds: of this layer.
        places: of a rank.
        device: of the layer.
    """

    in_training = False

    def __init__(self, thresholds: Thresholds, places: Places, device: torch.device) -> None:
        self.thresholds, self.places, self.counts = thresholds, places, DropCounts(device)

    def apply(self, routing: Routing) -> Routing:
        """See `drop`."""
        ranks = len(routing.choices.rows_E) // self.places.local_experts
        dropped = drop(routing, self.thresholds.skip, self.thresholds.halve, self.places, ranks)
        self.counts.add(routing, dropped, self.places)
        return dropped
