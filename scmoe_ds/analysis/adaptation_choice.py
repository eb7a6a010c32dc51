"""Which layers to convert for a budget of loss, of hidden communication, or of both. No torch, no model.

Losses of single layers do not add up: each was measured with all other layers as the source has them. So a set is
composed greedily by the sums, then its own loss is measured, and the set is changed until the measured loss fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scmoe_ds.analysis.adaptation_times import LayerTime, Way, hidden_share


@dataclass(frozen=True)
class Cost:
    """One layer, converted alone and in one way, with nothing trained.

    Attributes:
        layer: number of the MoE layer, from 0.
        cosine: similarity of the two ends of its shortcut.
        loss: held-out loss of the model, nats per token.
        increase: that loss less the source's, nats per token.
        time: None if it is not known.
    """

    layer: int
    cosine: float
    loss: float
    increase: float
    time: LayerTime | None


@dataclass(frozen=True)
class Budget:
    """What a choice has to keep to.

    Attributes:
        max_increase: most that the loss may grow, as a share of the source's; None: any.
        min_hidden: least share of the communication that runs beside computation; None: any.
    """

    max_increase: float | None = None
    min_hidden: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is anything to choose by."""
        return self.max_increase is not None or self.min_hidden is not None


@dataclass(frozen=True)
class Choice:
    """Layers to convert in one way.

    Attributes:
        layers: in the order in which they were chosen: least loss per time saved first.
        summed: the source's loss and the sum of the layers' single increases.
        loss: measured, with these layers converted together and nothing trained.
        saved_ms, hidden: time saved per micro-batch, share of the communication hidden; None: not known.
        fits: whether it keeps to the budget.
    """

    way: Way
    layers: tuple[int, ...]
    summed: float
    loss: float
    saved_ms: float | None
    hidden: float | None
    fits: bool


class Chooser:
    """Composes the set of one way.

    Args:
        way: in which the layers are converted.
        costs: of every layer in this way.
        source: held-out loss of the source.
        measure: the held-out loss with a set of layers converted together.
    """

    def __init__(
        self, way: Way, costs: Sequence[Cost], source: float, measure: Callable[[Sequence[int]], float]
    ) -> None:
        self.way, self.source, self._measure = way, source, measure
        self.is_timed = all(each.time is not None for each in costs)
        self.in_order = sorted(costs, key=lambda each: (self._price(each), each.layer))
        self._known: dict[frozenset[int], float] = {frozenset(): source}

    def gain(self, cost: Cost) -> float:
        """What converting a layer is worth: milliseconds saved, or 1 if no times are known."""
        return cost.time.saved_ms if self.is_timed and cost.time is not None else 1.0

    def _price(self, cost: Cost) -> float:
        gain = self.gain(cost)
        return cost.increase / gain if gain > 0 else float("inf")

    def loss(self, costs: Sequence[Cost]) -> float:
        """Measured, once per set."""
        key = frozenset(each.layer for each in costs)
        if key not in self._known:
            self._known[key] = self._measure(sorted(key))
        return self._known[key]

    def hidden(self, costs: Sequence[Cost]) -> float | None:
        """Share of all layers' communication that is hidden when these are converted; None if no times are known."""
        if not self.is_timed:
            return None
        now = [each.time.after if each in costs else each.time.before for each in self.in_order if each.time]
        return hidden_share(now)

    def saved_ms(self, costs: Sequence[Cost]) -> float | None:
        """Of these layers together; None if no times are known."""
        return sum(map(self.gain, costs)) if self.is_timed else None

    def summed(self, costs: Sequence[Cost]) -> float:
        """The loss if increases added up."""
        return self.source + sum(each.increase for each in costs)

    def choose(self, budget: Budget) -> Choice:
        """The set for a budget; one that does not fit is the nearest of this way."""
        chosen = self._least_hidden(budget.min_hidden)
        share = self.hidden(chosen)
        fits = budget.min_hidden is None or (share is not None and share >= budget.min_hidden)
        if fits and budget.max_increase is not None:
            limit = self.source * (1 + budget.max_increase)
            fits = self.loss(chosen) <= limit
            chosen = self._within(limit, chosen) if fits else chosen
            if not chosen:  # no layer fits alone: the cheapest one says by how much
                chosen, fits = [min(self.in_order, key=lambda each: each.increase)], False
        return self._choice(chosen, fits)

    def all(self) -> Choice:
        """Every layer."""
        return self._choice(self.in_order, True)

    def _choice(self, chosen: Sequence[Cost], fits: bool) -> Choice:
        ordered = [each for each in self.in_order if each in chosen]
        return Choice(
            way=self.way,
            layers=tuple(each.layer for each in ordered),
            summed=self.summed(ordered),
            loss=self.loss(ordered),
            saved_ms=self.saved_ms(ordered),
            hidden=self.hidden(ordered),
            fits=fits,
        )

    def _least_hidden(self, least: float | None) -> list[Cost]:
        """The cheapest layers that hide enough together; all layers if even they do not."""
        if least is None or not self.is_timed:
            return []
        chosen: list[Cost] = []
        for cost in self.in_order:
            if (self.hidden(chosen) or 0.0) >= least:
                break
            chosen.append(cost)
        for cost in sorted(chosen, key=lambda each: -each.increase):  # an early one may not be needed any more
            rest = [each for each in chosen if each is not cost]
            if cost.increase > 0 and (self.hidden(rest) or 0.0) >= least:
                chosen = rest
        return chosen

    def _within(self, limit: float, start: Sequence[Cost]) -> list[Cost]:
        """`start` and whatever else has a gain and fits: by the sums first, then as it is measured."""
        chosen = list(start)
        others = [each for each in self.in_order if each not in chosen and self.gain(each) > 0]
        for cost in others:
            if self.summed([*chosen, cost]) <= limit:
                chosen.append(cost)
        while len(chosen) > len(start) and self.loss(chosen) > limit:
            chosen.pop()
        for cost in others:
            if cost not in chosen and self.loss([*chosen, cost]) <= limit:
                chosen.append(cost)
        return chosen


def best(choices: Sequence[Choice], budget: Budget) -> Choice:
    """Of several ways' choices: one that fits, before one that does not. With a limit of loss it saves the most time
    (or converts the most layers), else it has the least loss."""

    def worth(choice: Choice) -> tuple[float, ...]:
        saved = float(len(choice.layers)) if choice.saved_ms is None else choice.saved_ms
        if budget.max_increase is None or not choice.fits:
            return choice.fits, _reached(choice, budget), -choice.loss, saved
        return choice.fits, saved, -choice.loss

    return max(choices, key=worth)


def _reached(choice: Choice, budget: Budget) -> float:
    """The hidden share up to the budget's: more of it is worth nothing."""
    return 0.0 if budget.min_hidden is None else min(choice.hidden or 0.0, budget.min_hidden)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (gain, loss) that no other point beats in both, by gain."""
    found: list[int] = []
    for number in sorted(range(len(points)), key=lambda each: (-points[each][0], points[each][1])):
        if not found or points[number][1] < points[found[-1]][1]:
            found.append(number)
    return found[::-1]
