"""Figures of a plan's page, as SVG: nothing has to be installed for them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from scmoe_ds.figure_style import BLUE, GREY, INK, LINES, OPERATORS
from scmoe_ds.simulate.rows import Row
from scmoe_ds.simulate.scaling import Point

_WIDTH, _LEFT, _BAR = 900, 230, 26
_PARTS = {
    "computation": BLUE,
    "all-to-all": OPERATORS["combine"],
    "gradients": OPERATORS["dispatch"],
    "optimizer": GREY,
}


def step_figure(rows: Sequence[Row]) -> str:
    """A bar for each method: what a step's time goes to, and the interval of its length."""
    most = max(row.step_ms.high for row in rows)
    scale = (_WIDTH - _LEFT - 20) / most
    drawn = [_legend()]
    for number, row in enumerate(rows):
        y, x = 30 + number * (_BAR + 8), float(_LEFT)
        drawn.append(_text(_LEFT - 8, y + _BAR * 0.7, row.name, "end"))
        for name, ms in _parts(row).items():
            drawn.append(_box(x, y, ms * scale, _BAR, _PARTS[name], f"{row.name}: {name} {ms:.1f} ms"))
            x += ms * scale
        low, high, middle = _LEFT + row.step_ms.low * scale, _LEFT + row.step_ms.high * scale, y + _BAR / 2
        drawn.append(
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10" '
            f'stroke="{INK}" fill="none"/>'
        )
    return _svg(drawn, 40 + len(rows) * (_BAR + 8))


def _parts(row: Row) -> dict[str, float]:
    step = row.run.step
    outside = {"all-to-all": step.exposed_ms, "gradients": step.exposed_reduce_ms, "optimizer": step.optimizer_ms}
    return {"computation": max(0.0, step.total_ms - sum(outside.values())), **outside}


def scaling_figure(points: Sequence[Point]) -> str:
    """Time of a step over the number of GPUs, a line for each method; both axes logarithmic."""
    names = [each.method.name for each in points[0].runs]
    times = [[one.step.total_ms for one in each.runs] for each in points]
    low, high = min(map(min, times)) / 1.3, max(map(max, times)) * 1.3
    first, last = points[0].gpus, max(points[-1].gpus, points[0].gpus + 1)

    def place(gpus: int, ms: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - 60) * math.log(gpus / first) / math.log(last / first)
        return x, 40 + 220 * math.log(high / ms) / math.log(high / low)

    drawn = []
    for number, name in enumerate(names):
        colour, spots = (
            LINES[number % len(LINES)],
            [place(each.gpus, ms[number]) for each, ms in zip(points, times, strict=True)],
        )
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        drawn.append(f'<path d="M{line}" stroke="{colour}" stroke-width="2" fill="none"/>')
        drawn.append(_text(_LEFT - 8, 60 + 18 * number, name, "end", colour))
        for (x, y), each, ms in zip(spots, points, times, strict=True):
            tip = html.escape(f"{name}, {each.gpus} GPUs: {ms[number]:.1f} ms")
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{tip}</title></circle>')
    drawn += [_text(place(each.gpus, low)[0], 280, str(each.gpus), "middle") for each in points]
    return _svg([*drawn, _text(_LEFT, 20, "ms per step (simulated) over GPUs")], 300)


def _legend() -> str:
    drawn, x = "", float(_LEFT)
    for name, colour in _PARTS.items():
        drawn += _box(x, 6, 12, 12, colour, name) + _text(x + 18, 17, name)
        x += 120
    return drawn


def _box(x: float, y: float, width: float, height: float, colour: str, tip: str) -> str:
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height}" fill="{colour}">'
    return f"{shape}<title>{html.escape(tip)}</title></rect>"


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(text)}</text>'


def _svg(drawn: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="100%" font-size="13" '
        f'font-family="sans-serif" style="background:#fff">{"".join(drawn)}</svg>'
    )
