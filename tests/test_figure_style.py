"""The style sheet: colours that everybody can tell apart, opaque sheets, names without paths."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scmoe_ds.figure_style import LINES, OPERATORS, WIDTH, plain_log_axis, png, save, short_names, styled

GROUNDS = {"white": "#ffffff", "a dark page": "#0d1117"}
# How people without one kind of cones see linear RGB (Machado, Oliveira and Fernandes 2009).
EYES = {
    "all cones": np.eye(3),
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def linear(colour: str) -> np.ndarray:
    srgb = np.array(to_rgb(colour))
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of luminances."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB; a difference of 2 is just seen."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("ground", GROUNDS)
def test_lines_stand_out(ground: str) -> None:
    assert min(contrast(colour, GROUNDS[ground]) for colour in LINES) >= 3, "WCAG asks for that of graphics"


@pytest.mark.parametrize("eyes", EYES)
def test_colours_can_be_told_apart(eyes: str) -> None:
    seen = [lab(np.clip(np.array(EYES[eyes]) @ linear(colour), 0, 1)) for colour in LINES]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10
    assert len(set(OPERATORS.values())) == len(OPERATORS)


@styled
def drawing() -> Figure:
    figure = Figure(figsize=(WIDTH, 2))
    for number in range(6):
        figure.add_subplot().plot([1, 2], [number, number])
    return figure


def test_the_sheet_is_opaque_and_of_one_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")  # as in a user's matplotlibrc
    monkeypatch.setitem(matplotlib.rcParams, "savefig.transparent", True)
    picture = Image.open(io.BytesIO(png(drawing())))
    assert picture.width == 1080 and picture.mode == "P" and "transparency" not in picture.info
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert matplotlib.rcParams["figure.facecolor"] == "black", "the user's own figures keep their style"
    save(drawing(), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(OSError):
        save(drawing(), tmp_path / "none" / "a.png")


def test_a_sixth_line_differs_by_its_dashes() -> None:
    @styled
    def lines() -> Figure:
        figure = Figure()
        axes = figure.subplots()
        for number in range(6):
            axes.plot([number, 1])
        return figure

    drawn = [(line.get_color(), line.get_linestyle()) for line in lines().axes[0].lines]
    assert drawn[0][0] == drawn[5][0] and drawn[0][1] != drawn[5][1] and len(set(drawn)) == 6


def test_log_axis_has_plain_numbers() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0.02, 3], [1, 2])
    plain_log_axis(axes, "x")
    figure.draw_without_rendering()
    shown = [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)]]
    assert {"0.1", "1", "0.2", "0.05", "2"} <= set(shown) and axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/home/me/runs/a"], ["a"]),
        (["/home/me/runs/a/global_step30"], ["a/global_step30"]),
        (["org/model"], ["org/model"]),
        (["/x/y/a (topk)", "/x/y/b (scmoe pos2)"], ["a (topk)", "b (scmoe pos2)"]),
        (["/x/a/global_step3", "/x/b/global_step3", "/x/a/global_step3"], ["a/global_step3", "b/global_step3"]),
        (["/x", "/x/y"], ["x", "y"]),
        ([""], [""]),
    ],
)
def test_short_names(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short
    assert list(short_names(names)) == list(dict.fromkeys(names))
