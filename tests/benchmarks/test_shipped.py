"""The README's table of the shipped clusters is what its command prints."""

from __future__ import annotations

from pathlib import Path

from benchmarks.predict.shipped import BEGIN, in_page, shipped, simulated
from scmoe_ds.simulate.cluster import read_cluster

README = Path(__file__).parents[2] / "README.md"


def test_the_table_is_that_of_the_command() -> None:
    text = README.read_text("utf-8")
    assert BEGIN in text
    assert in_page(text) == text, "python -m benchmarks.predict.shipped README.md writes it"


def test_gains_are_nowhere_beyond_what_can_be() -> None:
    """What is hidden is communication: a ScMoE is no faster than a shared expert that waits for none."""
    for path in shipped()[:3]:
        _, _, shared, scmoe = simulated(read_cluster(path))
        without = shared.step_ms.likely * (1 - shared.exposed_share.likely)
        assert 0.97 * without <= scmoe.step_ms.likely <= shared.step_ms.likely
        assert scmoe.mfu.low >= 0.2 and scmoe.mfu.high <= 0.8
