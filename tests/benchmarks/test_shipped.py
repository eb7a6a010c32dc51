"""The README's table of the shipped clusters is what its command prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.predict.shipped import in_page, shipped, simulated
from scmoe_ds.simulate.cluster import read_cluster

README = Path(__file__).parents[2] / "README.md"


def test_the_table_is_that_of_the_command() -> None:
    """Its words, and its numbers but for what rounding and a finer price of some kernel move."""
    text = README.read_text("utf-8")
    written, printed = (re.split(r"(\d+\.?\d*)(?= %| \(|–|\))", page) for page in (text, in_page(text)))
    assert written[::2] == printed[::2], "python -m benchmarks.predict.shipped README.md writes it"
    assert len(written) > 150
    for ours, theirs in zip(written[1::2], printed[1::2], strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.03 if "." in ours else 1), "it is out of date"


def test_gains_are_nowhere_beyond_what_can_be() -> None:
    """What is hidden is communication: a ScMoE is no faster than a shared expert that waits for none."""
    for path in shipped()[:3]:
        _, _, shared, scmoe = simulated(read_cluster(path))
        without = shared.step_ms.likely * (1 - shared.exposed_share.likely)
        assert 0.97 * without <= scmoe.step_ms.likely <= shared.step_ms.likely
        assert scmoe.mfu.low >= 0.2 and scmoe.mfu.high <= 0.8
