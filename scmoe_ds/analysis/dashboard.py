"""The page of `scmoe dashboard`: the records of training runs as one HTML file that needs no server and no network.

This module chooses the numbers and puts them into `dashboard.html` as JSON; the script in there draws them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import takewhile
from typing import Any

from scmoe_ds.figure_style import LIKE, LINES, OPERATORS
from scmoe_ds.planner.schedule_text import layers_text, order_text
from scmoe_ds.training.record import Entry, RunRecord

MOST_POINTS = 400
"""Of a curve; more log lines than that are averaged."""
MOST_CELLS = 150_000
"""Of a run's heat maps, so that a page stays small."""
DEAD = 0.01
"""An expert is dead when it gets less than this part of the mean load."""
_LINES_TO_BE_DEAD = 3
_CHARTS = (
    ("Loss", "nats per {one}", ("loss", "validation"), ""),
    ("Accuracy", "% of the validation set", ("accuracy",), "share"),
    ("Dropped tokens", "%", ("drop_rate",), "share"),
    ("Communication hidden", "%", ("hidden",), "share"),
    ("Exposed communication", "ms per iteration", ("exposed_ms",), "amount"),
    ("Throughput", "{one}s/s", ("per_second",), "amount"),
    ("TFLOP/s", "per rank", ("tflops",), "amount"),
    ("MFU", "%", ("mfu",), "share"),
    ("Memory", "GiB, largest rank", ("memory_gib",), "amount"),
    ("Gradient norm", "", ("grad_norm",), ""),
    ("Learning rate", "", ("learning_rate",), "amount"),
    ("Balancing loss", "", ("moe_loss",), ""),
)
"""Title, unit (one: token or image), curves, and their kind: a share is shown in %, and like an amount from 0 on."""
_VALIDATIONS = ("validation", "accuracy")
_NO_FACTS = ("kind", "iteration", "time", "loss_name", "unit", "summary")


def page(runs: Mapping[str, RunRecord]) -> str:
    """The HTML of runs, by name."""
    unit = next((str(record.start["unit"]) for record in runs.values() if "unit" in record.start), "tokens")
    charts = [
        {"title": title, "unit": text.format(one=unit.removesuffix("s")), "curves": curves, "kind": kind}
        for title, text, curves, kind in _CHARTS
    ]
    data = {
        "unit": unit,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "colours": LINES,
        "operators": OPERATORS | {name: OPERATORS[other] for name, other in LIKE.items()},
        "charts": charts,
        "dead": DEAD,
        "runs": [_run(name, record) for name, record in runs.items()],
    }
    # In a script element only "<" could end it; the script puts every text into the page as text, never as markup.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("scmoe_ds.analysis").joinpath("dashboard.html").read_text(encoding="utf-8")
    return template.replace("@DATA@", text)


def _run(name: str, record: RunRecord) -> dict[str, Any]:
    start, last = record.start, next(reversed(record.steps.values()), {})
    names = {
        "loss": record.loss_name,
        "validation": record.loss_name,
        "per_second": f"{start.get('unit', 'tokens')}_per_second",
    }
    curves = {
        curve: _thinned(*record.curve(names.get(curve, curve), "validations" if curve in _VALIDATIONS else "steps"))
        for _, _, of_chart, _ in _CHARTS
        for curve in of_chart
    }
    return {
        "name": name,
        "iteration": last.get("iteration", start.get("iteration", 0)),
        "train_iters": start.get("train_iters"),
        "seconds_left": last.get("seconds_left"),
        "time": max((each.get("time", 0) for each in [start, last]), default=0),
        "curves": curves,
        "summary": [[key, str(value)] for key, value in start.get("summary", {}).items()],
        "facts": [[key, _words(value)] for key, value in start.items() if key not in _NO_FACTS and value is not None],
        "resumed": [each["iteration"] for each in record.starts[1:]],
        "schedules": [_schedule(each) for each in _distinct(record.schedules)],
        "load": _load(list(record.steps.values())),
    }


def _thinned(iterations: Sequence[int], values: Sequence[float]) -> list[list[float]]:
    """A curve of at most `MOST_POINTS` points: the mean of as many neighbours as that takes, at the last of them."""
    size = -(-len(values) // MOST_POINTS) or 1
    groups = range(0, len(values), size)
    means = [statistics.fmean(values[place : place + size]) for place in groups]
    return [
        [iterations[min(place + size, len(iterations)) - 1] for place in groups],
        [_rounded(each) for each in means],
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _load(steps: Sequence[Entry]) -> dict[str, Any] | None:
    """Each expert's load over the mean, for every MoE layer and log line, and which experts are dead."""
    steps = [each for each in steps if each.get("expert_load")]
    if not steps:
        return None
    shape = [len(layer) for layer in steps[-1]["expert_load"]]
    steps = [each for each in steps if [len(layer) for layer in each["expert_load"]] == shape]
    columns = max(10, min(MOST_POINTS // 3, MOST_CELLS // sum(shape)))
    size = -(-len(steps) // columns)
    groups = [steps[place : place + size] for place in range(0, len(steps), size)]
    layers = []
    for layer, experts in enumerate(shape):
        lines = [[share * experts for share in each["expert_load"][layer]] for each in steps]
        rows = [
            [round(statistics.fmean(each["expert_load"][layer][e] * experts for each in group), 2) for group in groups]
            for e in range(experts)
        ]
        layers.append({"rows": rows, "dead": _dead([each["iteration"] for each in steps], lines)})
    return {"iterations": [group[-1]["iteration"] for group in groups], "layers": layers}


def _dead(iterations: Sequence[int], lines: Sequence[Sequence[float]]) -> list[list[int]]:
    """Dead experts, each with the log line's iteration from which on it was dead in all lines, three at least."""
    found = []
    for expert in range(len(lines[0])):
        dead = len(list(takewhile(lambda loads: loads[expert] < DEAD, reversed(lines))))  # noqa: B023
        if dead >= _LINES_TO_BE_DEAD:
            found.append([expert, iterations[-dead]])
    return found


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Without those that a later entry repeats, which knows more: what a comparison has measured."""
    names = ("layers", "slot", "chunks", "overlap")
    return list({str([entry.get(name) for name in names]): entry for entry in entries}.values())


def _schedule(entry: Entry) -> dict[str, Any]:
    """A schedule in words, and as the planner predicts it."""
    layers, operators = entry.get("layers") or [], entry.get("operators") or []
    where = f"MoE layer{'s' if len(layers) > 1 else ''} {layers_text(layers)}, " if layers else ""
    lines = [str(entry.get("text", "")), order_text(operators, entry.get("slot") or []) if operators else ""]
    if entry.get("hidden") is not None:
        total, exposed = (f"{entry[name]:.3g} ms" for name in ("total_ms", "exposed_ms"))
        span = entry.get("span") or "from shortcut to join"
        lines.append(
            f"predicted: {100 * entry['hidden']:.0f} % of the communication hidden; {total} {span} per "
            f"micro-batch, forward and backward, of them {exposed} waiting for communication"
        )
    if measured := entry.get("measured"):
        lines.append(f"overlap {'on' if measured['overlap'] else 'off'}, measured: {measured['text']}")
    text = "\n".join(filter(None, lines))
    title = f"{where}from iteration {entry['iteration']} on"
    return {"title": title, "text": text, "timeline": entry.get("timeline") or []}


def _words(value: Any) -> str:
    """A value of the record for people."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(each)}" for key, each in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, (list, tuple)) else str(value)
