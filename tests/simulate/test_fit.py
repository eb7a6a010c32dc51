"""Measured steps name the figure of a description that is wrong, or say that they cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.fit import FIGURES, MeasuredStep, Parts, error_of, fit, least
from tests.simulate.clusters import cluster

ALIKE = cluster(nodes=2, launch=5e-6)
SETTINGS = ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0))
"""Micro-batch, steps between two updates."""


def steps(described: Cluster, settings: Sequence[tuple[float, float]] = SETTINGS) -> list[Parts]:
    """A machine in five lines, so that each figure has another signature."""
    assert described.between is not None
    found = []
    for batch, accumulation in settings:
        compute = batch * (4e12 / described.gpu.peak["bf16"] + 2e10 / described.gpu.bandwidth)
        exposed = batch * (1e9 / described.inside.rate + 2e8 / described.between.nic_rate)
        micro = compute + exposed + 2000 * described.gpu.launch + 100 * described.between.latency
        update = 3e9 / described.gpu.bandwidth
        total = 1e3 * (accumulation * micro + update)
        found.append({"total": total, "exposed": 1e3 * accumulation * exposed, "optimizer": 1e3 * update})
    return found


def measured(described: Cluster, *parts: str, settings: Sequence[tuple[float, float]] = SETTINGS) -> list[MeasuredStep]:
    return [
        MeasuredStep(str(setting), {name: step[name] for name in ("total", *parts)})
        for setting, step in zip(settings, steps(described, settings), strict=True)
    ]


@pytest.mark.parametrize("figure", [each for each in FIGURES if each.path not in ("between.latency", "optimizer")])
@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_the_changed_figure_is_named(figure, factor) -> None:
    found = fit(measured(figure.scaled(ALIKE, factor), "exposed"), steps, ALIKE)
    assert figure in [each.figure for each in found.best]
    mine = next(each for each in found.explanations if each.figure is figure)
    assert mine.factor == pytest.approx(factor, rel=0.05)
    assert mine.error < 0.01 < found.error


def test_a_slow_update_is_told_from_a_slow_memory() -> None:
    slow = [MeasuredStep("a", {**step, "optimizer": 9.0, "total": step["total"] + 6.0}) for step in steps(ALIKE)]
    (only,) = fit(slow, steps, ALIKE).best
    assert only.figure.path == "optimizer" and only.factor == pytest.approx(3.0, rel=0.05)


def test_one_total_cannot_tell() -> None:
    settings = SETTINGS[:1]
    changed = FIGURES[0].scaled(ALIKE, 0.5)
    found = fit(measured(changed, settings=settings), lambda described: steps(described, settings), ALIKE)
    assert len(found.best) >= 3 and not found.is_right


def test_right_descriptions_and_two_wrong_figures() -> None:
    assert fit(measured(ALIKE, "exposed"), steps, ALIKE).is_right
    peak, _, launch, *_ = FIGURES
    both = fit(measured(launch.scaled(peak.scaled(ALIKE, 0.3), 20.0), "exposed"), steps, ALIKE)
    assert not both.best or both.best[0].error > 2 * both.noise


def test_steps_that_no_single_figure_explains() -> None:
    odd = [
        MeasuredStep("a", {"total": step["total"] * factor})
        for step, factor in zip(steps(ALIKE), (2.0, 0.5, 1.5), strict=True)
    ]
    assert fit(odd, steps, ALIKE).best == ()


def test_figures_that_a_cluster_has_not() -> None:
    alone = cluster(nodes=1, gpus_per_node=1)
    found = fit(
        [MeasuredStep("a", {"total": 20.0})], lambda described: [{"total": 1e15 / described.gpu.peak["bf16"]}], alone
    )
    assert [each.figure.path for each in found.explanations] == ["gpu.peak"]
    assert {each.path for each in found.without_effect} == {"gpu.bandwidth", "gpu.launch", "optimizer"}


def test_errors_and_the_search() -> None:
    half = [MeasuredStep("a", {"total": 10.0, "exposed": 4.0})]
    assert error_of(half, [{"total": 10.0, "exposed": 5.0}]) == pytest.approx((0.01 / 2) ** 0.5)
    assert least(lambda x: abs(x - 1.7), -3.0, 3.0) == pytest.approx(1.7, abs=1e-2)
    with pytest.raises(ValueError, match="no measured steps"):
        fit([], steps, ALIKE)
