"""All that `scmoe plan` answers to one question: rows, break-even, limit, recommendation, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scmoe_ds.simulate.advice import chosen, limit, recommendation
from scmoe_ds.simulate.break_even import BreakEven, break_even
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.rows import Row, machines, rows
from scmoe_ds.simulate.scaling import Point, scaling
from scmoe_ds.simulate.search import Search, search
from scmoe_ds.simulate.space import Fixed, require_possible


@dataclass(frozen=True)
class Answers:
    """What a question's answer consists of.

    Attributes:
        rows: the methods that fit, each in its fastest layout.
        break_even: of the network and of the links inside nodes.
        limit, recommendation: a sentence each, without a full stop.
        weak, strong: scaling; empty where nobody asked.
    """

    search: Search
    rows: tuple[Row, ...]
    break_even: tuple[BreakEven, ...]
    limit: str
    recommendation: str
    weak: tuple[Point, ...] = ()
    strong: tuple[Point, ...] = ()


def answer(
    model: Model,
    cluster: Cluster,
    profile: Profile | None,
    routing: Routing,
    fixed: Fixed,
    tokens: float = 1e9,
    sizes: Sequence[int] = (),
) -> Answers:
    """Searches, and asks everything about what was found.

    Args:
        tokens: of a whole training, for hours and costs; of an image model, samples.
        sizes: numbers of GPUs of the scaling.

    Raises:
        PlanError: a fixed value that nothing can have, a model that fits nowhere.
    """
    require_possible(model, cluster, fixed)
    likely, *corners = machines(cluster, profile)
    found = search(model, likely, routing, fixed)
    table = rows(model, found.runs, corners, routing, tokens)
    limits = [break_even(model, found.runs, likely, routing, links) for links in ("network", "inside")]
    best = chosen(table)
    compared = [found.runs[0]] if best is table[0] else [found.runs[0], best.run]
    weak, strong = (
        scaling(model, cluster, profile, routing, fixed, compared, sizes, weak=each) if sizes else []
        for each in (True, False)
    )
    return Answers(
        search=found,
        rows=tuple(table),
        break_even=tuple(each for each in limits if each is not None),
        limit=limit(best.run),
        recommendation=recommendation(table),
        weak=tuple(weak),
        strong=tuple(strong),
    )
