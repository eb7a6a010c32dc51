"""Decisions about routed tokens that fall between the gate and the dispatch.

With a shortcut there is time for them: a whole window lies between the gate and the experts.

    gate ─► routing rule ─► notice to every rank ─► early rule ─► encode, dispatch ─► experts
            this rank alone   in the row counts'     all ranks' loads are known
                              own exchange

A routing rule changes what this rank has routed, by what this rank alone knows: it leaves choices out (1T-Drop), or
sends them to the parts of an expert.

An early rule decides by what all ranks know. Each rank hands every other one a notice: numbers that travel in the
exchange of row counts, in the place of these. When the notices are there, the rule may leave out more choices
(load-aware drops), or send rows to other places (copies).

Experts may tell each other something as well, such as how many rows tolerate low precision. Their notice travels
beside the row counts (`OwnExperts.notice`).

A place is what a row is sent to: an expert, a part of one, its major half, or a copy. Every rank has as many places.
Place p lies on rank p // (places per rank).

Shape suffixes: T tokens, K choices of a token, E places of all ranks, P ranks, X numbers of a notice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.order import ByExpert
from scmoe_ds.moe.slices import TokenSlices


class RoutingRule(Protocol):
    """Changes a routing on the rank that has made it.

    Attributes:
        in_training: whether it also does so in training; otherwise in evaluation mode alone.
    """

    in_training: bool

    def apply(self, routing: Routing) -> Routing:
        """The routing to places; see `rerouted`."""


class Decision(NamedTuple):
    """What an early rule has decided.

    Attributes:
        routing: to places; see `rerouted`.
        counts: how many rows this rank sends to each rank, and gets from each; both [P, X] int64 on the host. The X
            numbers are the rows for each place of the receiving rank. Where a token has one row per rank
            (`exchange.one_row_per_rank`), one more number counts these rows. None: the rule does not know all that,
            and the row counts are exchanged when it has decided.
    """

    routing: Routing
    counts: tuple[Tensor, Tensor] | None


class EarlyRule(Protocol):
    """Decides when the loads of all ranks are known, before a row is sent; in evaluation mode alone.

    Its notice takes the place of the row counts in their exchange. So it costs no further collective, if `decide`
    knows the row counts afterwards.
    """

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        """[P, X] int64 on the tokens' device: what each rank is told. X is the same on all ranks."""

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        """
        Args:
            routing: what `notice` was handed.
            slices: who sends what to whom.
            own_PX: int64 on the host, what this rank has told each rank.
            told_PX: int64 on the host, what each rank has told this one.
        """


class Ruled(Protocol):
    """A layer with decisions between its gate and its dispatch; None: there is none of this kind."""

    training: bool
    partition: RoutingRule | None
    routing_rule: RoutingRule | None
    early_rule: EarlyRule | None


def apply_rule(layer: Ruled, routing: Routing) -> Routing:
    """A routing as the layer's partition and routing rule change it, in this order: the rule sees choices of parts."""
    if layer.partition is not None:
        routing = layer.partition.apply(routing)
    rule = layer.routing_rule
    return routing if rule is None or (layer.training and not rule.in_training) else rule.apply(routing)


def early_rule_of(layer: Ruled) -> EarlyRule | None:
    """The layer's early rule, if it decides now."""
    return None if layer.training else layer.early_rule


def rerouted(routing: Routing, place_KT: Tensor, kept_KT: Tensor | None, places: int) -> Routing:
    """The same tokens on their way to other places.

    Args:
        routing: its weights stay, but for 0 where a choice is no longer kept. `exp_counts` goes on to count all choices
            of the gate.
        place_KT: int64, the place in [0, places) that each choice's row is sent to; of a choice that is not kept, any.
        kept_KT: bool, which choices have a row; None: all.
        places: number of places of all ranks together.
    """
    key_KT = place_KT if kept_KT is None else torch.where(kept_KT, place_KT, places)
    order = ByExpert.of(key_KT)
    rows_E = order.starts(places).diff()
    choices = replace(routing.choices, expert_KT=place_KT, kept_KT=kept_KT, order=order, rows_E=rows_E)
    weight_KT = routing.weight_KT if kept_KT is None else routing.weight_KT * kept_KT
    return replace(routing, choices=choices, weight_KT=weight_KT)
