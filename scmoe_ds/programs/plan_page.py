"""The answers of `scmoe plan` as one HTML page that loads nothing, with figures and each number's interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scmoe_ds.analysis.page import Part, as_html
from scmoe_ds.programs.plan_figures import scaling_figure, step_figure
from scmoe_ds.programs.plan_question import Question
from scmoe_ds.programs.plan_text import between, count, heading, legend, ms, scaling_lines, sentences
from scmoe_ds.simulate.answers import Answers
from scmoe_ds.simulate.rows import Row
from scmoe_ds.simulate.scaling import Point
from scmoe_ds.simulate.search import layout_text

_HEAD = [
    "method, simulated",
    "ms per step",
    "per second",
    "MFU",
    "speed-up",
    "waits for all-to-alls",
    "GB per GPU",
    "GPU hours",
    "cost",
    "layout",
]


def page(question: Question, found: Answers) -> str:
    """The page."""
    title = f"Plan: {question.model.name} on {question.cluster.name}"
    return as_html(list(_parts(question, found, title)), b"", title)


def _parts(question: Question, found: Answers, title: str) -> Iterator[Part]:
    yield "h1", title
    yield from heading(question)
    for name, text in sentences(question, found):
        yield f"{name.capitalize()}: {text}."
    yield "h2", "Methods"
    yield "table", [_HEAD, *(_cells(each) for each in found.rows)]
    yield from legend(question, found)
    yield "svg", step_figure(found.rows)
    yield "Bars: computation of a step, waiting for all-to-alls and gradients, the optimizer. Whiskers: the interval."
    for weak, points in ((True, found.weak), (False, found.strong)):
        if points:
            yield from _scaling(question, points, weak)
    yield "h2", "Where the figures of the cluster are from"
    yield "table", [["figure", "source"], *([path, text] for path, text in question.cluster.sources.items())]


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        between(row.step_ms, ms),
        between(row.tokens_per_second, count),
        between(row.mfu, lambda value: f"{100 * value:.0f} %"),
        between(row.speedup, lambda value: f"{value:.2f}"),
        between(row.exposed_share, lambda value: f"{100 * value:.0f} %"),
        f"{row.run.memory.total / 1e9:.1f}",
        between(row.gpu_hours, count),
        "" if row.cost is None else between(row.cost, count),
        layout_text(row.run.layout),
    ]


def _scaling(question: Question, points: Sequence[Point], weak: bool) -> Iterator[Part]:
    first, *rows, last = scaling_lines(question, points, weak)
    yield "h2", first.capitalize()
    yield "svg", scaling_figure(points)
    yield "pre", "\n".join(rows)
    yield last
