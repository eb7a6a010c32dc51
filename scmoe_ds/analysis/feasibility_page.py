"""Writes the result of `feasibility` as one page: Markdown with the figure beside it, and HTML with it inside."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scmoe_ds.analysis import page
from scmoe_ds.analysis.feasibility import MODES, QUALITY_RUNS, KindStudy, Prediction, conclude
from scmoe_ds.analysis.page import Part
from scmoe_ds.analysis.similarity import POSITIONS
from scmoe_ds.figure_style import OPERATORS, WIDTH, coloured_as, png, styled
from scmoe_ds.planner.schedule_text import schedule_text
from scmoe_ds.planner.speed_text import compared

_PHASES = ("forward", "backward")
_DRAWN = {
    "attention": "attention",
    "mlp": "MLP",
    "shared": "shared expert",
    "dispatch": "dispatch",
    "combine": "combine",
}


def _title(position: str) -> str:
    return f"Pos-{position[-1]}"


def _ms(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.2f}" for value in values]


def parts(record: dict[str, Any], kinds: list[KindStudy]) -> list[Part]:
    """The page from top to bottom."""
    named = [f", kind {n} of {len(kinds)} of MoE layers" if len(kinds) > 1 else "" for n in range(1, len(kinds) + 1)]
    sizes = ", ".join(f"{name}: {value}" for name, value in record["identity"].items())
    found: list[Part] = [
        ("h1", "Would ScMoE pay?"),
        f"Similarity was measured in {record['model']}, times in a model of the same sizes ({sizes}). A JSON has one "
        "position for all kinds of MoE layers.",
        ("h2", "Conclusion"),
        *_conclusion(kinds, record["verdict"], named),
    ]
    found += [("h2", "Similarity, a hint"), *_similarity(record["verdict"])]
    for name, kind in zip(named, kinds, strict=True):
        found += [("h2", f"Times{name}"), *_times(kind), ("h2", f"Predictions{name}"), *_predictions(kind)]
    return [*found, ("h2", "Windows and communication"), ("img", "window against communication by position, measured")]


def _conclusion(kinds: list[KindStudy], verdict: dict[str, Any], named: list[str]) -> list[Part]:
    word, best = conclude(kinds)
    rows = [["position", "training, predicted from shortcut to join", "by time", "similarity, a hint"]]
    for position, (kind, name) in itertools.product(POSITIONS, zip(kinds, named, strict=True)):
        study, hint = kind.positions[position], _hint(verdict, position)
        if each := study.predictions.get("train"):
            row = [_speeds(kind, each), "pays" if each.pays else "does not pay", hint]
        else:
            row = [f'{study.source}; a calibration at "position": "{position}" has it', "", hint]
        rows.append([_title(position) + name, *row])
    found: list[Part] = [f"ScMoE {word}.", ("table", rows)]
    if best is not None and word.startswith("pays"):
        found.append(("pre", json.dumps({"scmoe": {"position": best}}, indent=2)))
    return found


def _speeds(kind: KindStudy, each: Prediction) -> str:
    overlap, standard = each.speedups
    text = (
        f"{100 * each.plan.predicted.hidden_share:.0f} % of the communication hidden; "
        f"{compared(overlap, 'without overlap')}; {compared(standard, f'top-{kind.top_k + 1}')}"
    )
    than = f"top-{kind.top_k} without a shared expert"
    faster = "faster" if each.hidden_ms > each.limits.shared_ms else "not faster"
    return (
        f"{text}; {faster} than {than} ({each.hidden_ms:.2f} ms hidden, shared expert {each.limits.shared_ms:.2f} ms)"
    )


def _hint(verdict: dict[str, Any], position: str) -> str:
    layers = verdict["positions"][position]["layers"]
    if not layers:
        return "no MoE layer has such a tap"
    unlike = [layer for layer in layers if layer["cosine"] < verdict["threshold"]]
    least = f"least {min(layer['cosine'] for layer in layers):.3f}"
    return f"unlike in {len(unlike)} of {len(layers)} MoE layers ({least})" if unlike else f"alike ({least})"


def _similarity(verdict: dict[str, Any]) -> list[Part]:
    rows = [["position", "mean cosine (measured)", "least (measured)", f"alike: at least {verdict['threshold']}"]]
    for position, found in verdict["positions"].items():
        cosines = ["" if found[key] is None else f"{found[key]:.3f}" for key in ("mean", "least")]
        rows.append([_title(position), *cosines, _hint(verdict, position)])
    runs = [
        ["our runs", "cosine in both MoE layers of top-2", "loss less that of top-2, nats"],
        *map(list, QUALITY_RUNS),
    ]
    return [
        "How alike the two ends of a shortcut are does not say how well a model learns with it. In our own small "
        "models, trained from scratch, shortcuts of low similarity had the lowest loss "
        "(benchmarks/results/quality.md):",
        ("table", runs),
        "In a model whose experts are trained already, an unlike tap feeds them another input than they know; what "
        "that costs, and how soon training makes up for it, only a training says. Measured here:",
        ("table", rows),
        *verdict["text"],
    ]


def _times(kind: KindStudy) -> list[Part]:
    one, times = kind.times.chunks[1], kind.times
    facts = ", ".join(f"{key}: {value}" for key, value in kind.description.items())
    named = {"gate": times.gate, "encode": times.encode, **{each.name: each for each in times.backbone}}
    named |= {"experts": one.experts, "decode": times.decode, "dispatch": one.dispatch, "combine": one.combine}
    rows = [[name, *_ms(each.forward_ms, each.backward_ms)] for name, each in named.items()]
    windows = [[_title(n), *_ms(*map(each.window_ms, _PHASES)), each.source] for n, each in kind.positions.items()]
    sums = " and ".join(f"{kind.communication_ms(phase):.2f} ms {phase}" for phase in _PHASES)
    return [
        f"Measured per MoE layer and micro-batch (blocking, median, slowest rank): dispatch and combine take {sums}. "
        f"{facts}",
        ("table", [["operator (measured)", "forward ms", "backward ms"], *rows]),
        "The window is the computation between shortcut and join, a sum of measured times.",
        ("table", [["position", "window forward ms", "window backward ms", "its times"], *windows]),
    ]


def _predictions(kind: KindStudy) -> list[Part]:
    top, standard = f"top-{kind.top_k}", f"top-{kind.top_k + 1} without shared expert"
    rows = [
        f"position|mode|schedule|hidden|ScMoE ms|without overlap ms|times as fast|{standard} ms|times as fast".split(
            "|"
        )
    ]
    limits = [f"position|mode|hidden ms|to beat {top}: above, ms|longest all-to-all hidden completely, ms".split("|")]
    for (name, position), mode in itertools.product(kind.positions.items(), MODES):
        first, totals, limit = [_title(name), "training" if mode == "train" else mode], [""] * 7, [""] * 3
        if each := position.predictions.get(mode):
            overlap, gain = (f"{speedup:.2f} ×" for speedup in each.speedups)  # below 1: slower
            costs = each.plan.predicted
            fast, serial, other = _ms(costs.total_ms, each.plan.serial.total_ms, each.standard_ms)
            chosen, hidden = schedule_text(each.plan.schedule), f"{100 * costs.hidden_share:.0f} %"
            totals = [chosen, hidden, fast, serial, overlap, other, gain]
            limit = _ms(each.hidden_ms, each.limits.shared_ms, each.limits.largest_hidden_ms)
        rows.append(first + totals)
        limits.append(first + limit)
    share = "twice" if kind.top_k == 1 else f"{kind.top_k + 1}/{kind.top_k} of"
    return [
        "Predicted, not measured: the times above, simulated on two lanes from shortcut to join. A field is empty when "
        "an operator was not timed.",
        ("table", rows),
        f"Assumed of {standard}: the same blocks; its dispatch, combine and experts take {share} the measured time and "
        "block; gate, encode and decode take the measured time.",
        f"Break-even: ScMoE is faster than {top} without a shared expert when it hides more communication per layer "
        "than the shared expert takes. The last column is for one chunk.",
        ("table", limits),
    ]


@styled
def figure(kinds: list[KindStudy]) -> Figure:
    """A row per kind of layers, with panels for forward and backward: each position's window and communication."""
    drawn = Figure(figsize=(WIDTH, 0.5 + 3.2 * len(kinds)))
    panels = drawn.subplots(len(kinds), 2, squeeze=False)
    for (row, kind), (column, phase) in itertools.product(enumerate(kinds), enumerate(_PHASES)):
        axes, transfers = panels[row][column], [(n, getattr(kind.times.chunks[1], n)) for n in ("dispatch", "combine")]
        for place, position in enumerate(kind.positions.values()):
            window = [(each.kind, each) for each in position.backbone or ()]
            for shift, stack in ((-0.2, window), (0.2, transfers)):
                times = [getattr(each, f"{phase}_ms") for _, each in stack]
                bottoms = [sum(times[:n]) for n in range(len(times))]
                colours = [OPERATORS[coloured_as(name)] for name, _ in stack]
                axes.bar([place + shift] * len(stack), times, 0.36, bottoms, color=colours)
            if not window:
                axes.text(place - 0.2, 0, " " + position.source, rotation=90, ha="center", va="bottom", fontsize=8)
        axes.set_xticks(range(len(kind.positions)), map(_title, kind.positions))
        axes.set(title=f"{phase}, measured", xlabel="left: window, right: communication", ylabel="ms")
    handles = [Patch(facecolor=OPERATORS[name], label=word) for name, word in _DRAWN.items()]
    drawn.legend(handles=handles, loc="outside lower center", ncols=5)
    return drawn


def write(record: dict[str, Any], kinds: list[KindStudy], prefix: str) -> list[Path]:
    """Writes <prefix>.md, .html and .png. Raises an AnalysisError if they cannot be written."""
    return page.write(parts(record, kinds), png(figure(kinds)), prefix, "ScMoE")
