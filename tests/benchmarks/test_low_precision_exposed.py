"""benchmarks.serving.low_precision_exposed: a fair comparison, and an interval of the median."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest
import torch

from benchmarks.harness.measure import median_interval
from benchmarks.harness.parts import RecordedPair
from benchmarks.harness.variants import Shape, build
from benchmarks.serving import low_precision as benchmark
from benchmarks.serving.low_precision_exposed import measure, pair_rounds, text, variants
from scmoe_ds.engine import connect
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.decisions.low_precision_formats import FORMATS
from scmoe_ds.overlap.schedule import Schedule


@pytest.mark.parametrize("count, below", [(6, 1), (10, 2), (20, 6), (60, 22), (100, 40)])
def test_the_median_s_interval_is_that_of_the_sign_test(count: int, below: int) -> None:
    """As in tables of the sign test."""
    values = [float(number) for number in range(count, 0, -1)]
    assert median_interval(values) == (below, count + 1 - below)


def test_five_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="5 values have no 95 % interval"):
        median_interval([1.0] * 5)


def test_rounds_without_an_interval_are_refused_before_they_are_measured() -> None:
    assert pair_rounds("6") == 6
    with pytest.raises(ArgumentTypeError, match="5: must be a whole number of at least 6"):
        pair_rounds("5")


def test_experts_that_are_converted_beforehand_compute_the_same() -> None:
    connect()
    torch.manual_seed(1)
    pair = build(benchmark.SCMOE, Shape("small", 32, 2, 2, 16, 2, 2.0), 0.0, "collective")
    pair.eval().requires_grad_(False)
    pair.schedule = Schedule(2)
    hidden, layer = torch.randn(2, 16, 32), pair.layer
    settings = LowPrecision("all", score=1.0, min_tokens=0)
    experts = variants(layer.deepspeed_moe.experts, layer.slices, settings, FORMATS["int8"], True)

    def output() -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = pair(hidden).hidden
        return found

    plain, found = output(), []
    for each in experts:
        layer.deepspeed_moe.experts = each
        found += [output(), output()]
    assert not torch.equal(found[0], plain)
    assert all(torch.equal(each, found[0]) for each in found)
    exposed = measure(RecordedPair(pair=pair), *experts, hidden, 6)
    assert exposed["work_ms"] > 0 and exposed["layer_ms"] > 0
    assert experts[0].counts.hot == experts[0].counts.passes == 2 + 6 + 2
    assert experts[1].counts.passes == 0
    assert f"take {exposed['work_ms']:.1f} ms" in text(exposed)
