"""The style sheet of all figures: colours, fonts, the sheet, and how it is written.

Figures are cards with a white ground, so that they read the same on light and on dark pages. They are as wide as a
column of text, because a page shrinks what is wider, and its letters with it.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawn = TypeVar("Drawn", bound=Callable[..., Any])

WIDTH = 9.0
"""Inches."""
_DPI = 120
BLUE, VERMILLION, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
LINES = (BLUE, VERMILLION, GREEN, PINK, GREY)
"""For lines, dots and text: colour-blind people can tell them apart, and their contrast is at least 3 to 1 on white and
on a dark page. A sixth line gets the first one's colour and dashes."""
MARKERS = ("o", "s", "^", "D", "v")
OPERATORS = {
    "attention": BLUE,
    "mlp": "#56B4E9",
    "shared": GREEN,
    "experts": VERMILLION,
    "gate": "#F0E442",
    "dispatch": "#E69F00",
    "combine": PINK,
    "other": "#BBBBBB",
    "wait": "#EEEEEE",
}
"""For areas with a dark edge: Okabe and Ito's palette. An operator has the same colour in each figure."""
LIKE = {"shared in": "shared", "shared out": "shared"} | dict.fromkeys(
    ("encode", "decode", "merge", "norm", "shortcut norm"), "gate"
)
"""Operators that have the colour of another one."""
INK = "#222222"
HEAT = "cividis"
"""Reads the same to colour-blind people, and in grey."""


def _style() -> Any:
    from cycler import cycler

    lines = cycler(color=LINES) + cycler(marker=MARKERS)
    return {
        "axes.prop_cycle": cycler(linestyle=("-", "--", ":", "-.")) * lines,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.axisbelow": True,
        "axes.grid.axis": "y",
        "figure.facecolor": "white",
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "font.family": "DejaVu Sans",  # comes with matplotlib: a figure looks the same on every machine
        "font.size": 10,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.8,
        "hatch.linewidth": 0.6,
        "image.cmap": HEAT,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "patch.edgecolor": INK,
        "patch.force_edgecolor": True,
        "patch.linewidth": 0.5,
        "savefig.facecolor": "white",
        "savefig.transparent": False,
        "text.color": INK,
        "text.parse_math": False,  # a "$" in a path is no formula
        "xtick.color": INK,
        "xtick.labelsize": 9,
        "ytick.color": INK,
        "ytick.labelsize": 9,
    }


def styled(draw: Drawn) -> Drawn:
    """A decorator for functions that make a figure: they do it in this style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        import matplotlib  # takes a second to import

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_style())
            return draw(*args, **kwargs)

    return drawn  # type: ignore[return-value]


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, SVG or PDF, by the suffix of the path. A PNG has 256 colours and is a third as large.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib does not know the suffix.
    """
    if Path(path).suffix == ".png":
        Path(path).write_bytes(png(figure))
    else:
        figure.savefig(path)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    from PIL import Image  # comes with matplotlib

    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=_DPI)
    picture = Image.open(whole).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def coloured_as(operator: str) -> str:
    """The name in `OPERATORS` whose colour an operator has."""
    name = LIKE.get(operator, operator)
    return name if name in OPERATORS else "other"


def plain_log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis for what has been drawn, with a grid and numbers like 0.02, 0.05, 0.1 instead of powers."""
    from matplotlib.ticker import LogLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis.set_major_formatter("{x:g}")
    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter("{x:g}")
    axes.grid(True)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names that tell models apart: a path without the directories that all have in common, and without the root.

    "/home/me/runs/scmoe/global_step300" alone is "scmoe/global_step300"; "org/model" stays.
    """
    whole = list(dict.fromkeys(names))
    parts = {name: PurePosixPath(name.replace(os.sep, "/")).parts for name in whole}
    if len(whole) == 1:
        (only,) = parts.values()
        kept = 2 if len(only) == 2 or "".join(only[-1:]).startswith("global_step") else 1
        return {whole[0]: "/".join(only[-kept:])}
    common = sum(1 for _ in itertools.takewhile(lambda of: len(set(of)) == 1, zip(*parts.values(), strict=False)))
    return {name: "/".join(of[min(common, len(of) - 1) :]) for name, of in parts.items()}
