"""Table and figure of a record of benchmarks.quality.sparse, and of the speed of drops where that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.measure import environment_text
from benchmarks.harness.tables import table
from scmoe_ds.figure_style import GREY, LINES, WIDTH, styled

LIMIT, RATE = 0.5, 0.25
"""Percent that 2T-Drop may cost at this rate."""
HIGH_RATE = 0.6
"""Where small models lose something, too."""
RESULTS = Path(__file__).resolve().parents[1] / "results"
SPEED = "drop_*.json"
"""Records of benchmarks.serving.drop."""
_METHODS = {"1t": "1T-Drop", "2t": "2T-Drop"}
Row = dict[str, Any]


def markdown(record: dict[str, Any]) -> str:
    """Verdict, rate → loss of each model, measures and spreads."""
    lines = [
        "# What drops cost trained models: rate → loss",
        "",
        f"`{record['command']}`",
        "",
        environment_text(record["environment"]) + ".",
        "",
        f"Text: {record['corpus']}. {record['tokens']} held-out tokens in {record['sequences']} sequences; thresholds "
        f"and neurons by {record['calibration_tokens']} tokens of training text. Losses are of the run-time path. "
        "Differences are paired by sequence, in percent of the loss without drops, with their 95 % interval over the "
        "sequences. In the rows of rate 0 nothing is dropped: they differ by the order of the neurons alone (A/A).",
        "",
        "![loss over that without drops, by the share of computation left out](sparse_quality.png)",
        "",
        "## Verdict",
        "",
        *table(["model", "claim", "found", "verdict"], chain.from_iterable(map(_verdicts, record["models"].values()))),
    ]
    for model in record["models"].values():
        lines += ["", f"## {model['title']}", "", *_of_model(model)]
    return "\n".join(lines) + "\n"


def _rows(model: dict[str, Any], measure: str, method: str, spread: bool = False) -> Iterator[Row]:
    for row in model["rows"]:
        if (row["measure"], row["method"]) == (measure, method) and (row["spread"] is not None) == spread:
            yield row


def _at(model: dict[str, Any], measure: str, method: str, rate: float = RATE) -> Row:
    return next(row for row in _rows(model, measure, method) if row["rate"] == rate)


def _verdicts(model: dict[str, Any]) -> Iterator[list[str]]:
    default = model["rows"][0]["measure"]
    two = _at(model, default, "2t")
    verdict = "confirmed" if two["high"] <= LIMIT else "contradicted" if two["low"] > LIMIT else "within noise"
    yield [model["title"], f"2T-Drop at {RATE:.0%}: at most +{LIMIT} %", _interval(two), verdict]
    for rate in (RATE, HIGH_RATE):
        over = _at(model, default, "2t", rate)["over_1t"]
        verdict = "confirmed" if over["high"] < 0 else "contradicted" if over["low"] > 0 else "within noise"
        yield [model["title"], f"2T-Drop costs less than 1T-Drop at {rate:.0%}", _interval(over), verdict]
    chance = _at(model, "chance", "2t")["over_1t"]
    yield [model["title"], f"control: the same at {RATE:.0%} with halves by chance", _interval(chance), ""]


def _interval(row: Row) -> str:
    return f"{row['percent']:+.3f} % ({row['low']:+.3f} … {row['high']:+.3f})"


def _of_model(model: dict[str, Any]) -> Iterator[str]:
    shares = ", ".join(f"{share:.0%}" for share in model["major_share"])
    yield (
        f"Top-{model['top_k']}, loss {model['loss']:.4f} nats per token. Spread of 2T-Drop ± {model['spread']:g} "
        f"unless the row says otherwise. The major halves hold {shares} of the importance, layer by layer."
    )
    yield ""
    rows = []
    for row in model["rows"]:
        method = _METHODS.get(row["method"] or "", "none")
        if row.get("spread") is not None:
            method += f", ± {row['spread']:g}"
        left_out = f"{row['dropped']:.1%} ({row['skipped']:.1%}, {row['halved']:.1%})" if row["method"] else ""
        over = _interval(row["over_1t"]) if "over_1t" in row else ""
        tenths = f"{row['p10']:+.2f} … {row['p90']:+.2f}"
        rows.append(
            [row["measure"], method, f"{row['rate']:.0%}", left_out, f"{row['loss']:.4f}", _interval(row), tenths, over]
        )
    yield from table(
        [
            "neurons by", "drops", "rate asked for", "left out (rows skipped, halved)", "loss", "over none, %",
            "sequences, p10 … p90", "over 1T-Drop at the same rate",
        ],
        rows,
    )  # fmt: skip


@styled
def figure(record: dict[str, Any]) -> Figure:
    """Rate → loss of each model; below, rate → time of a layer, if that was measured."""
    models, speed = list(record["models"].values()), _speed()
    drawn = Figure(figsize=(WIDTH, 6.8 if speed else 3.4), layout="constrained")
    upper, lower = drawn.subfigures(2, 1) if speed else (drawn, None)
    axes = upper.subplots(1, len(models), squeeze=False)[0]
    for ax, model in zip(axes, models, strict=True):
        default = model["rows"][0]["measure"]
        series = [("1T-Drop", default, "1t"), ("2T-Drop", default, "2t"), ("2T-Drop, halves by chance", "chance", "2t")]
        for (label, measure, method), colour in zip(series, LINES, strict=False):
            rows = [{"dropped": 0.0, "percent": 0.0, "low": 0.0, "high": 0.0}, *_rows(model, measure, method)]
            error = [[row["percent"] - row["low"] for row in rows], [row["high"] - row["percent"] for row in rows]]
            x, y = [100 * row["dropped"] for row in rows], [row["percent"] for row in rows]
            ax.errorbar(x, y, yerr=error, color=colour, capsize=2, label=label)
        ax.axhline(LIMIT, color=GREY, linewidth=1)
        ax.set_title(model["title"])
        ax.set_xlabel("computation left out, %")
    axes[0].set_ylabel("loss over none, %")
    upper.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if lower is not None:
        _draw_speed(lower.subplots(), speed)
    return drawn


def _speed() -> dict[str, list[tuple[float, float]]]:
    """(share left out, time of a layer over that without drops) of each curve in the records of benchmarks.serving.drop
    beside this one's; nothing where there is none."""
    found: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(RESULTS.glob(SPEED)):
        record = json.loads(path.read_text(encoding="utf-8"))
        curve = record.get("curve")
        for row in curve["rows"] if curve else []:
            name, _, rate = row["row"].rpartition(", ")
            if rate and row["shares"] is not None:
                point = row["shares"]["dropped"], 1 / row["layer_speedup"]["median"]
                label = f"{curve['layer']}, {name}, all-to-all {record['settings']['share']:.0%} of a top-2 layer"
                found.setdefault(label, [(0.0, 1.0)]).append(point)
    return found


def _draw_speed(ax: Axes, speed: dict[str, list[tuple[float, float]]]) -> None:
    for (name, points), colour in zip(speed.items(), LINES, strict=False):
        ax.plot([100 * share for share, _ in points], [time for _, time in points], color=colour, label=name)
    ax.set_xlabel("computation left out, %")
    ax.set_ylabel("time of a layer over none")
    ax.legend()
