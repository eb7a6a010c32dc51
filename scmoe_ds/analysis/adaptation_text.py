"""An `Adaptation` for people: tables, sentences and the command that does what was chosen."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from scmoe_ds.analysis.adaptation import Adaptation, hidden_before, pareto
from scmoe_ds.analysis.adaptation_choice import Choice, Cost
from scmoe_ds.analysis.adaptation_times import Way
from scmoe_ds.analysis.page import Part

Rows = list[list[str]]


def costs_table(found: Adaptation) -> Rows:
    """A row for each way and layer, and one for all layers of a way together; the head first."""
    head = ["MoE layer", "position", "similarity", "loss", "increase"]
    if found.is_timed:
        head += ["ms before", "ms after", "ms saved", "hidden before", "hidden after"]
    rows = [head]
    for way in found.ways:
        rows += [_row(found, way.way, each) for each in way.costs]
        every = way.all_layers
        row = ["all", way.way.text, "", f"{every.loss:.4f}", _increase(every.loss - found.source, found.source)]
        if found.is_timed:
            row += ["", "", _ms(every.saved_ms), _percent(hidden_before(way)), _percent(every.hidden)]
        rows.append(row)
    return rows


def _row(found: Adaptation, way: Way, cost: Cost) -> list[str]:
    row = [str(cost.layer), way.text, f"{cost.cosine:.3f}", f"{cost.loss:.4f}", _increase(cost.increase, found.source)]
    if found.is_timed and cost.time is not None:
        before, after = cost.time.before, cost.time.after
        row += [_ms(before.total_ms), _ms(after.total_ms), _ms(cost.time.saved_ms)]
        row += [_percent(before.hidden_share), _percent(after.hidden_share)]
    return row + [""] * (10 - len(row) if found.is_timed else 0)


def front_table(found: Adaptation) -> Rows:
    """The sets that no other beats, from the source itself on."""
    rows = [["layers", "position", "ms saved" if found.is_timed else "converted", "loss, summed", "increase, summed"]]
    for way, layers, gain, loss in pareto(found):
        text = layers_text(layers) or "none"
        share = _ms(gain) if found.is_timed else f"{gain:.0f}"
        rows.append(
            [text, way.text if layers else "", share, f"{loss:.4f}", _increase(loss - found.source, found.source)]
        )
    return rows


def layers_text(layers: Sequence[int]) -> str:
    """Their numbers."""
    return ", ".join(map(str, layers))


def _increase(nats: float, source: float) -> str:
    return f"{nats:+.4f} ({100 * nats / source:+.2f} %)"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def sentences(found: Adaptation, source: str, text: str) -> Iterator[str]:
    """What was measured, and where the times are from."""
    yield (
        f"{source}: loss {found.source:.4f} nats per token on {text} ({found.tokens} tokens). Each row below converts "
        "one MoE layer and trains nothing."
    )
    yield found.times
    for way in found.ways:
        similar = sorted(way.costs, key=lambda each: -each.cosine)
        order = layers_text([each.layer for each in similar])
        yield f"{way.way.text}: most similar ends first: {order}; cheapest first: {layers_text(way.order)}"


def choice_sentences(found: Adaptation, choice: Choice) -> Iterator[str]:
    """What was chosen. Says the sum of the losses and the loss of the set."""
    saved = "" if choice.saved_ms is None else f", which saves {choice.saved_ms:.2f} ms per micro-batch"
    hidden = "" if choice.hidden is None else f" and hides {_percent(choice.hidden)} of the communication"
    layers = f"MoE layers {layers_text(choice.layers)} at {choice.way.text}"
    yield f"chosen for {budget_text(found)}: {layers}{saved}{hidden}"
    yield (
        f"its loss, measured: {choice.loss:.4f}, {_increase(choice.loss - found.source, found.source)}; the single "
        f"increases add up to {choice.summed:.4f}, {_increase(choice.summed - found.source, found.source)}"
    )


def budget_text(found: Adaptation) -> str:
    """As the flags set it."""
    asked = []
    if found.budget.max_increase is not None:
        asked.append(f"--max-loss-increase {100 * found.budget.max_increase:g}%")
    if found.budget.min_hidden is not None:
        asked.append(f"--min-hidden {100 * found.budget.min_hidden:g}%")
    return " and ".join(asked)


def not_reached(found: Adaptation, choice: Choice) -> str:
    """One sentence: what comes nearest to a budget that nothing keeps to."""
    layers = f"MoE layer{'s' if len(choice.layers) > 1 else ''} {layers_text(choice.layers)} at {choice.way.text}"
    hides = "" if choice.hidden is None else f", and {_percent(choice.hidden)} of the communication hidden"
    return (
        f"{budget_text(found)}: no layers and position keep to it; the nearest is {layers}, with a loss of "
        f"{_increase(choice.loss - found.source, found.source)}{hides}"
    )


def command(source: str, choice: Choice, output: str | None, more: Sequence[str] = ()) -> str:
    """The command that converts what was chosen."""
    words = ["scmoe", "adapt", source, "--output", output or "DIR"]
    words += ["--position", choice.way.position, "--join", choice.way.join]
    if choice.way.first_layer_position is not None:
        words += ["--first-layer-position", choice.way.first_layer_position]
    return shlex.join([*words, "--layers", *map(str, sorted(choice.layers)), *more])


def aligned(rows: Rows) -> list[str]:
    """A table as lines of text: columns of one width, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def parts(found: Adaptation, source: str, text: str, doing: str | None) -> list[Part]:
    """The page from top to bottom; `doing` is the command for the choice."""
    page: list[Part] = [
        ("h1", "What converting each MoE layer costs"),
        *sentences(found, source, text),
        ("table", costs_table(found)),
        ("h2", f"Loss against {'time' if found.is_timed else 'layers'}"),
        ("img", "loss increase against what is gained"),
        "Sets of layers that no other set beats. The losses are sums of single increases; no set was measured.",
        ("table", front_table(found)),
    ]
    if found.choice is not None:
        page += [("h2", "Choice"), *choice_sentences(found, found.choice), ("pre", doing or "")]
    return page
