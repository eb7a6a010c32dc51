"""The answers of `scmoe plan` as lines of a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from scmoe_ds.programs.plan_question import Question
from scmoe_ds.simulate.answers import Answers
from scmoe_ds.simulate.break_even import PAYS, BreakEven
from scmoe_ds.simulate.rows import Interval, Row
from scmoe_ds.simulate.scaling import Point, first_that_does_not_fit
from scmoe_ds.simulate.search import layout_text
from scmoe_ds.simulate.units import in_words

HEAD = ("#", "method", "ms per step", "per second", "MFU", "speed-up", "waits", "GB", "GPU hours", "layout")


def lines(question: Question, found: Answers) -> list[str]:
    """All of them, from what was asked to scaling."""
    head = HEAD if question.cluster.price is None else (*HEAD[:-1], "cost", HEAD[-1])
    shown = [
        *heading(question),
        "",
        *table([head, *(cells(each, number) for number, each in enumerate(found.rows, 1))]),
        "",
    ]
    shown += [*legend(question, found), ""]
    shown += [f"{name}: {text}." for name, text in sentences(question, found)]
    for weak, points in ((True, found.weak), (False, found.strong)):
        if points:
            shown += ["", *scaling_lines(question, points, weak)]
    return shown


def heading(question: Question) -> list[str]:
    """What was asked, and that nothing of it is a measurement."""
    cluster, fixed, profile = question.cluster, question.fixed, question.profile
    samples = "images" if question.model.images else f"sequences × {question.model.stages[0].tokens} tokens"
    known = (
        "no measurement of this cluster is in it (scmoe probe makes one)"
        if profile is None
        else f"with what scmoe probe measured on {profile.nodes} × {profile.gpus_per_node} {profile.device}"
    )
    return [
        f"{question.model.name} on {cluster.name}: {cluster.nodes} × {cluster.gpus_per_node} {cluster.gpu.name}",
        f"a step: {fixed.batch} {samples}, {fixed.base.precision}; simulated, {known}",
    ]


def cells(row: Row, number: int) -> tuple[str, ...]:
    """A row of the table."""
    layout = row.run.layout
    return (
        str(number),
        row.name,
        between(row.step_ms, ms),
        count(row.tokens_per_second.likely),
        f"{100 * row.mfu.likely:.0f} %",
        between(row.speedup, lambda value: f"{value:.2f}"),
        f"{100 * row.exposed_share.likely:.0f} %",
        f"{row.run.memory.total / 1e9:.0f}",
        count(row.gpu_hours.likely),
        *([] if row.cost is None else [count(row.cost.likely)]),
        layout_text(layout),
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the second and the last to the left, all others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    left = (1, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def between(value: Interval, text: Callable[[float], str]) -> str:
    """A number and its interval."""
    low, high = text(value.low), text(value.high)
    return text(value.likely) if low == high else f"{text(value.likely)} ({low}–{high})"


def ms(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def count(value: float) -> str:
    """A large number in three digits: "1.23 M"."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def legend(question: Question, found: Answers) -> list[str]:
    """What the columns are."""
    unit = "images" if question.model.images else "tokens"
    price = question.cluster.price
    return [
        f"per second: {unit}. waits: share of a step in which computation waits for all-to-alls. GPU hours: for "
        f"{question.tokens:.3g} {unit}" + ("." if price is None else f"; cost: at {price:g} per GPU hour."),
        "layout: EP and TP, ZeRO stage, micro-batch × accumulation. In brackets: how far off a number may be.",
    ]


def sentences(question: Question, found: Answers) -> Iterator[tuple[str, str]]:
    """Recommendation, limit, break-even, and what is not in the table: a heading and a sentence each."""
    yield "recommended", found.recommendation
    yield "limit", found.limit
    for each in found.break_even:
        yield "break-even", break_even_text(each)
    reasons: dict[str, list[str]] = {}
    for name, reason in found.search.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield "not shown", f"{', '.join(names)}: {reason}"


def break_even_text(found: BreakEven) -> str:
    """At which rate of the links the gains end."""
    what = "a NIC" if found.links == "network" else "a GPU inside its node"
    here, least = f"here {rate(found.rate)}", f"{100 * (PAYS - 1):.0f} %"
    most = f"it gains most, {100 * (found.gain - 1):.0f} %, at {rate(found.best * found.rate)}"
    if found.scmoe == 0:
        text = f"at no rate of {what} is ScMoE faster by {least} than all methods without a shortcut ({here})"
    else:
        parts = [f"from {rate(found.scmoe_from * found.rate)}"] if found.scmoe_from else []
        parts += [] if math.isinf(found.scmoe) else [f"up to {rate(found.scmoe * found.rate)}"]
        text = f"ScMoE pays {' '.join(parts) or 'at any rate'} of {what} ({here}); {most}"
    if found.overlap == 0:
        return f"{text}; no overlap gains {least} at any"
    return (
        text
        if math.isinf(found.overlap)
        else f"{text}; above {rate(found.overlap * found.rate)} no overlap gains {least}"
    )


def rate(value: float) -> str:
    """Bytes per second."""
    return in_words(value, "B/s")


def scaling_lines(question: Question, points: Sequence[Point], weak: bool) -> list[str]:
    """The table of a scaling, and from where on the all-to-all does not fit its window."""
    names = [each.method.name for each in points[0].runs]
    head = ("GPUs", "batch", *(f"{name}, ms" for name in names), "speed-up", "waits", "efficiency", "layout")
    body = [
        (
            str(each.gpus),
            str(each.batch),
            *(ms(one.step.total_ms) for one in each.runs),
            f"{each.runs[0].step.total_ms / each.runs[-1].step.total_ms:.2f}",
            f"{100 * each.exposed_share:.0f} %",
            f"{100 * each.efficiency:.0f} %",
            layout_text(each.runs[-1].layout),
        )
        for each in points
    ]
    kind = "weak scaling: the batch grows with the GPUs" if weak else "strong scaling: the batch stays"
    first = first_that_does_not_fit(points)
    fits = (
        f"the all-to-all of {names[-1]} fits its window at every size"
        if first is None
        else f"the all-to-all of {names[-1]} no longer fits its window from {first.gpus} GPUs on"
    )
    return [kind, *table([head, *body]), f"{fits}."]
