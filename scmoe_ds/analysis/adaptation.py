"""What it costs to convert each MoE layer of a trained model to a ScMoE with nothing trained, and what it saves.

The loss is the honest cost: the model's loss on a text with that one layer converted. The similarity of the two ends of
a shortcut, which one forward pass of the source gives for all layers, is only a hint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scmoe_ds.analysis.adaptation_choice import Budget, Choice, Chooser, Cost, best, front
from scmoe_ds.analysis.adaptation_times import LayerTime, Way, hidden_share
from scmoe_ds.moe.conversion import Conversion


@dataclass(frozen=True)
class Student:
    """The source after surgery, in evaluation mode: any of its MoE layers can be converted.

    Attributes:
        conversion: of its layers.
        loss: measures its held-out loss, nats per token, as it is converted at the time of the call.
    """

    conversion: Conversion
    loss: Callable[[], float]


@dataclass(frozen=True)
class WayCosts:
    """All layers in one way.

    Attributes:
        costs: of each layer, in order.
        order: the layers, least loss per time saved first.
        all_layers: converted together.
    """

    way: Way
    costs: tuple[Cost, ...]
    order: tuple[int, ...]
    all_layers: Choice


@dataclass(frozen=True)
class Adaptation:
    """What was measured.

    Attributes:
        source: held-out loss of the source.
        tokens: of the text.
        ways: the ways that the model can have.
        choice: for the budget; None: there is no budget.
        budget: as it was asked for.
        times: where the times are from, or why there are none.
    """

    source: float
    tokens: int
    ways: tuple[WayCosts, ...]
    choice: Choice | None
    budget: Budget
    times: str

    @property
    def is_timed(self) -> bool:
        """Whether the times of every layer are known in some way."""
        return any(way.all_layers.saved_ms is not None for way in self.ways)


def measure(
    open_student: Callable[[Way], Student],
    ways: Sequence[Way],
    tokens: int,
    cosines: Mapping[str, Mapping[int, float]],
    times: Callable[[Way, int], LayerTime | None],
    budget: Budget,
    origin: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Adaptation:
    """One student is in memory at a time.

    Args:
        open_student: the source after surgery for a way, with all layers convertible.
        ways: those that the model can have, at least one.
        tokens: of the held-out text.
        cosines: by position and MoE layer, from `similarity_of_ends`.
        times: before and after of an MoE layer in a way; None: not known.
        budget: if it is set, a choice is made.
        origin: of the times.
        progress: is told what has been measured.
    """
    source, found, choices = 0.0, list[WayCosts](), list[Choice]()
    for way in ways:
        student = open_student(way)

        def loss(layers: Sequence[int], student: Student = student) -> float:
            student.conversion.only(layers)
            return student.loss()

        if not found:
            source = loss(())
            progress(f"as it is: loss {source:.4f}")
        costs = []
        for layer in student.conversion.numbers:
            alone, cosine = loss([layer]), cosines[way.at(layer)][layer]
            progress(f"MoE layer {layer} at {way.text}: loss {alone:.4f} ({alone - source:+.4f})")
            costs.append(Cost(layer, cosine, alone, alone - source, times(way, layer)))
        chooser = Chooser(way, costs, source, loss)
        order = tuple(each.layer for each in chooser.in_order)
        found.append(WayCosts(way, tuple(costs), order, chooser.all()))
        if budget.is_set:
            choices.append(chooser.choose(budget))
    choice = best(choices, budget) if choices else None
    return Adaptation(source, tokens, tuple(found), choice, budget, origin)


def similarity_of_ends(
    verdict: Mapping[str, Any], moe_blocks: Sequence[tuple[int, int]]
) -> dict[str, dict[int, float]]:
    """Cosine similarity of the two ends by position and MoE layer.

    Args:
        verdict: of `analysis.similarity.verdict`.
        moe_blocks: (stage, block) of every MoE layer, in order.
    """
    number = {block: layer for layer, block in enumerate(moe_blocks)}
    return {
        position: {number[each["stage"], each["block"]]: each["cosine"] for each in found["layers"]}
        for position, found in verdict["positions"].items()
    }


def most_similar(cosines: Mapping[int, float], count: int) -> list[int]:
    """The layers with the most similar ends, those first."""
    return sorted(cosines, key=lambda layer: (-cosines[layer], layer))[:count]


def pareto(found: Adaptation) -> Iterator[tuple[Way, tuple[int, ...], float, float]]:
    """The sets that no other beats in loss and in gain, by gain: way, layers, gain and summed loss.

    The sets are the source itself and, of each way, the cheapest layers, the two cheapest, … The gain is milliseconds
    saved per micro-batch, or the number of layers if no times are known.
    """
    sets: list[tuple[Way, tuple[int, ...], float, float]] = []
    for way in found.ways:
        sets += prefixes(way, found.source, found.is_timed)
    for number in front([(gain, loss) for _, _, gain, loss in sets]):
        yield sets[number]


def prefixes(way: WayCosts, source: float, is_timed: bool) -> list[tuple[Way, tuple[int, ...], float, float]]:
    """Of one way, from none to all layers: way, layers, gain and summed loss."""
    by_layer = {each.layer: each for each in way.costs}
    gain, loss = 0.0, source
    sets: list[tuple[Way, tuple[int, ...], float, float]] = [(way.way, (), gain, loss)]
    for place, layer in enumerate(way.order, start=1):
        cost = by_layer[layer]
        gain += (cost.time.saved_ms if cost.time is not None else 0.0) if is_timed else 1.0
        loss += cost.increase
        sets.append((way.way, way.order[:place], gain, loss))
    return sets


def record(found: Adaptation) -> dict[str, Any]:
    """JSON values."""
    return {
        "loss": found.source,
        "tokens": found.tokens,
        "times": found.times,
        "budget": asdict(found.budget),
        "ways": [_way_record(way) for way in found.ways],
        "front": [
            {**asdict(way), "layers": list(layers), ("saved_ms" if found.is_timed else "converted"): gain, "loss": loss}
            for way, layers, gain, loss in pareto(found)
        ],
        "choice": None if found.choice is None else _choice_record(found.choice),
    }


def _way_record(way: WayCosts) -> dict[str, Any]:
    return {
        **asdict(way.way),
        "text": way.way.text,
        "order": list(way.order),
        "most_similar": most_similar({each.layer: each.cosine for each in way.costs}, len(way.costs)),
        "hidden_before": hidden_before(way),
        "all": _choice_record(way.all_layers),
        "layers": [
            {
                "layer": each.layer,
                "cosine": each.cosine,
                "loss": each.loss,
                "increase": each.increase,
                **({} if each.time is None else _time_record(each.time)),
            }
            for each in way.costs
        ],
    }


def _time_record(time: LayerTime) -> dict[str, float]:
    return {
        "before_ms": time.before.total_ms,
        "after_ms": time.after.total_ms,
        "saved_ms": time.saved_ms,
        "hidden_before": time.before.hidden_share,
        "hidden": time.after.hidden_share,
    }


def _choice_record(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice.way), **{name: value for name, value in asdict(choice).items() if name != "way"}}


def hidden_before(way: WayCosts) -> float | None:
    """Share of the source's communication that is hidden; None if no times are known."""
    times = [each.time.before for each in way.costs if each.time is not None]
    return hidden_share(times) if len(times) == len(way.costs) else None
