"""The page of `scmoe adapt report`: verdict, losses, tasks, speed and costs, and the student's curve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from scmoe_ds.analysis import page
from scmoe_ds.analysis.adaptation_report import WHO, Report, Who
from scmoe_ds.analysis.page import Part
from scmoe_ds.figure_style import BLUE, GREY, INK, VERMILLION, WIDTH, png, styled
from scmoe_ds.planner.speed_text import compared

CLOSE = 0.01
"""A student within this share of its teacher's loss is as good."""
_FLAT = 0.001
"""A loss that falls by less than this share in the last third of the tokens has stopped falling."""
_SLOW, _EXPOSED = 1.1, 0.8
_HEADS: dict[Who, str] = {"teacher": "teacher", "before": "student before", "after": "student after"}


def verdict(found: Report) -> str:
    """One sentence: how good, how fast, and what limits."""
    return "; ".join([_quality(found), _speed(found), _limit(found)]) + "."


def _quality(found: Report) -> str:
    if found.main is None or found.gap is None:
        return "How good the student is cannot be said, because no text has a loss of teacher and student both"
    losses = found.main[1]
    numbers = f"({losses['after']:.4f} against {losses['teacher']:.4f} nats per token)"
    spent = "" if not found.tokens else f" after {_count(found.tokens)} tokens"
    if found.gap <= 0:
        return f"The student is as good as its teacher{spent} {numbers}"
    near = "within" if found.gap <= CLOSE else "not within"
    return f"The student's loss is {100 * found.gap:.2f} % above its teacher's{spent} {numbers}, {near} 1 %"


def _speed(found: Report) -> str:
    if found.speedup is None:
        return "how much faster it trains was not measured"
    after = found.speeds["after"]
    text = "its training " + compared(found.speedup, "the teacher's")
    return f"{text}, although each step has a pass of the teacher in it" if after.with_teacher else text


def _limit(found: Report) -> str:
    if found.gap is not None and found.gap > CLOSE:
        falls = found.still_falls
        if falls is None:
            return "whether more tokens would help, the records do not say"
        if falls > _FLAT * found.curve[-1][1]:
            return f"what limits is training: its loss still fell by {falls:.4f} in the last third of the tokens"
        return (
            "what limits is the conversion: the loss has stopped falling; convert fewer layers, or at another position "
            "(scmoe adapt --measure)"
        )
    after = found.speeds.get("after")
    if after is not None and after.hidden is not None and after.hidden < _EXPOSED:
        return f"what limits is the window: {100 * (1 - after.hidden):.0f} % of the communication stays exposed"
    if found.speedup is not None and found.speedup < _SLOW:
        return "what limits is how little of a step is communication"
    return "nothing of what was measured limits it"


def parts(found: Report, student: str) -> list[Part]:
    """The page from top to bottom."""
    shown: list[Part] = [("h1", f"Adaptation: {student}"), verdict(found), ("h2", "Loss")]
    if found.losses:
        shown.append(
            ("table", [["nats per token, perplexity", *_HEADS.values(), "above the teacher"], *_losses(found)])
        )
    else:
        shown.append("No loss is known: give records of scmoe evaluate --output, or train with a validation.")
    if found.curve:
        shown.append(("img", "loss of the student over the tokens of its training"))
    shown.append(("h2", "Tasks"))
    if found.tasks:
        rows = [[task, *(_number(numbers.get(who), ".4f") for who in WHO)] for task, numbers in found.tasks.items()]
        shown.append(("table", [["task", *_HEADS.values()], *rows]))
    else:
        shown.append(
            "No task was evaluated: scmoe evaluate --load MODEL --tasks … --output FILE.json asks a model; --teacher, "
            "--before and --after take the file."
        )
    return [*shown, ("h2", "Speed"), *_speeds(found), ("h2", "Cost"), *_costs(found)]


def _losses(found: Report) -> Iterator[list[str]]:
    for text, losses in found.losses.items():
        cells = [
            "" if who not in losses else f"{losses[who]:.4f}, {math.exp(min(losses[who], 700)):.2f}" for who in WHO
        ]
        both = {"teacher", "after"} <= losses.keys()
        yield [text, *cells, f"{100 * (losses['after'] / losses['teacher'] - 1):+.2f} %" if both else ""]


def _speeds(found: Report) -> Iterator[Part]:
    rows = []
    for who, speed in sorted(found.speeds.items(), reverse=True):
        ranks, nodes, card = speed.machine
        hidden = "" if speed.hidden is None else f"{100 * speed.hidden:.0f} %"
        name = "teacher" if who == "teacher" else "student" + (", with a pass of the teacher" * speed.with_teacher)
        times = [f"{1000 * speed.seconds:.1f}", f"{speed.tokens_per_second:.0f}", hidden]
        rows.append([name, *times, f"{ranks} × {card} on {nodes} node{'s' if nodes != 1 else ''}"])
    if rows:
        yield "table", [["training step, measured", "ms", "tokens per second", "hidden", "on"], *rows]
    if "teacher" not in found.speeds:
        yield "The teacher's step is not known: name its --save directory by --teacher-run."
    elif len(rows) == 2 and found.speedup is None:
        yield "The two runs were on different machines, so that their speeds are not compared."


def _costs(found: Report) -> Iterator[Part]:
    if not found.tokens:
        yield "The records hold no training of the student."
        return
    share = (
        ""
        if not found.tokens_of_teacher
        else f", {100 * found.tokens / found.tokens_of_teacher:.1f} % of the teacher's"
    )
    yield f"{_count(found.tokens)} tokens{share}, in {found.hours or 0.0:.2f} hours of training steps."


def _count(tokens: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return str(tokens)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@styled
def figure(found: Report) -> Figure:
    """The validation's loss over the tokens of the student's training, and the teacher's."""
    drawn = Figure(figsize=(WIDTH, 3.6))
    axes = drawn.subplots()
    losses = found.losses.get(found.validations, {})
    axes.plot(*zip(*found.curve, strict=True), color=BLUE, label="student") if found.curve else None
    if "teacher" in losses:
        axes.axhline(losses["teacher"], color=VERMILLION, marker="", label="teacher")
        limit = losses["teacher"] * (1 + CLOSE)
        axes.axhline(limit, color=GREY, linestyle=":", marker="", label=f"teacher + {100 * CLOSE:g} %")
    axes.set(xlabel="tokens of the student's training", ylabel="nats per token")
    axes.set_title(found.validations, color=INK, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return drawn


def write(found: Report, student: str, prefix: str) -> list[Path]:
    """Writes <prefix>.md, .html and .png. Raises an AnalysisError if they cannot be written."""
    return page.write(parts(found, student), png(figure(found)), prefix, f"Adaptation: {student}")
