"""All that `scmoe plan` answers to one question: rows, break-even, limit, recommendation, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scmoe_ds.simulate.advice import chosen, limit, recommendation
from scmoe_ds.simulate.break_even import BreakEven, break_even
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.profile import Profile
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.rows import Row, machines, rows
from scmoe_ds.simulate.scaling import Point, scaling
from scmoe_ds.simulate.search import Run, Search, run, search
from scmoe_ds.simulate.space import Fixed, require_possible


@dataclass(frozen=True)
class Answers:
    """What a question's answer consists of.

    Attributes:
        rows: the methods that fit, each in its fastest layout; behind them the given one.
        best: the recommended row.
        break_even: of the network and of the links inside nodes.
        limit, recommendation: a sentence each, without a full stop.
        weak, strong: scaling; empty where nobody asked.
    """

    search: Search
    rows: tuple[Row, ...]
    best: Row
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
    given: tuple[Method, Layout] | None = None,
) -> Answers:
    """Searches, and asks everything about what was found.

    Args:
        tokens: of a whole training, for hours and costs; of an image model, samples.
        sizes: numbers of GPUs of the scaling.
        given: a method and layout that get a row of their own, behind all others, whether they fit or not.

    Raises:
        PlanError: a fixed value that nothing can have, a model that fits nowhere.
    """
    require_possible(model, cluster, fixed)
    likely, *corners = machines(cluster, profile)
    found = search(model, likely, routing, fixed)
    own = [] if given is None else [run(model, *given, likely, routing)]
    table = rows(model, [*found.runs, *own], corners, routing, tokens)
    searched = table[: len(found.runs)]
    limits = [break_even(model, found.runs, likely, routing, links) for links in ("network", "inside")]
    best = chosen(searched)
    compared = _compared(searched, best)
    weak, strong = (
        scaling(model, cluster, profile, routing, fixed, compared, sizes, weak=each) if sizes else []
        for each in (True, False)
    )
    return Answers(
        search=found,
        rows=tuple(table),
        best=best,
        break_even=tuple(each for each in limits if each is not None),
        limit=limit(best.run),
        recommendation=recommendation(searched),
        weak=tuple(weak),
        strong=tuple(strong),
    )


def _compared(searched: Sequence[Row], best: Row) -> list[Run]:
    """What a scaling compares: the first row, the recommended one, and the best ScMoE, each once."""
    shortcut = [each for each in searched if each.run.method.architecture == "scmoe"]
    last = best if best in shortcut or not shortcut else min(shortcut, key=lambda each: each.step_ms.likely)
    return list({id(each): each.run for each in (searched[0], best, last)}.values())
