"""Decisions about routed tokens that fall between the gate and the dispatch.

With a shortcut there is time for them: a whole window lies between the gate and the experts.

    gate ─► routing rule ─► notice to every rank ─► early rule ─► encode, dispatch ─► experts
            this rank alone   in the row counts'     all ranks' loads are known
                              own exchange

A routing rule changes what this rank has routed: it leaves choices out, or divides experts into parts. An early rule
decides when all ranks have told it their notices. It may leave out more, or send rows to other places. Experts that
want to know more than their row counts have a notice of their own (`OwnExperts.notice`).

A place is what a row is sent to: an expert, a part of one, or a copy. Place p lies on rank p // (places per rank).

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
    """Changes a routing where it is made; in evaluation mode, or always where `in_training` says so."""

    in_training: bool

    def apply(self, routing: Routing) -> Routing:
        """The routing to places; see `rerouted`."""


class Decision(NamedTuple):
    """What an early rule has decided.

    Attributes:
        routing: to places; see `rerouted`.
        counts: [P, X] int64 on the host, what this rank sends to each rank and what it gets from each: rows for each
            place of the rank that gets them, and where a token has one row per rank, the number of these. None: the
            rule does not know, and row counts are exchanged after it.
    """

    routing: Routing
    counts: tuple[Tensor, Tensor] | None


class EarlyRule(Protocol):
    """Decides when the loads of all ranks are known, before a row is sent; in evaluation mode alone.

    A notice takes the place of the row counts in their exchange: it costs no further collective.
    """

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        """[P, X] int64 on the tokens' device: what each rank is told. X is the same on all ranks."""

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        """
        Args:
            routing: of `notice`.
            slices: who sends what to whom.
            own_PX: on the host, this rank's notice.
            told_PX: on the host, what each rank has told this one.
        """


class Ruled(Protocol):
    """A layer with decisions between its gate and its dispatch."""

    training: bool
    partition: RoutingRule | None
    routing_rule: RoutingRule | None
    early_rule: EarlyRule | None


def apply_rule(layer: Ruled, routing: Routing) -> Routing:
    """What the layer's routing rule makes of a routing. Where experts run in parts, it reads choices of parts."""
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
        place_KT: int64 place of each choice in [0, places); any where it is not kept.
        kept_KT: bool, which choices have a row; None: all.
        places: of all ranks together; those of a rank follow each other.
    """
    key_KT = place_KT if kept_KT is None else torch.where(kept_KT, place_KT, places)
    order = ByExpert.of(key_KT)
    rows_E = order.starts(places).diff()
    choices = replace(routing.choices, expert_KT=place_KT, kept_KT=kept_KT, order=order, rows_E=rows_E)
    weight_KT = routing.weight_KT if kept_KT is None else routing.weight_KT * kept_KT
    return replace(routing, choices=choices, weight_KT=weight_KT)
