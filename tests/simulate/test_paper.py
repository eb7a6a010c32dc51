"""The paper's rows are predicted without a look at those with a shortcut, and the record says what it says."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.predict.others import CLAIMS, agrees
from benchmarks.predict.paper import Simulation, is_predicted
from benchmarks.predict.paper_choice import CANDIDATES, choices
from benchmarks.predict.paper_fit import LIMITS, Factors, fit
from benchmarks.predict.paper_page import page
from benchmarks.predict.paper_rows import ROWS, SETTINGS, Row, Setting
from benchmarks.predict.unfused import unfused
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.work import Kernel
from tests.simulate.clusters import cluster

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RECORD = json.loads((RESULTS / "plan_paper.json").read_text("utf-8"))


def test_the_fit_reads_no_row_with_a_shortcut() -> None:
    hidden = [row for row in ROWS if "ScMoE" in row.method or row.method == "top-3"]
    assert len(hidden) == 23 and not any(row.fitted for row in hidden)
    with pytest.raises(ValueError, match="without a shortcut"):
        fit(hidden[:1], lambda factors, rows: [1.0], ["inside"], Factors())


def test_the_fit_finds_factors_by_ratios() -> None:
    rows = [Row("gpt2", "train", "top-1", "speed-up", 1.5), Row("gpt2", "train", "top-2", "share", 0.3)]

    def predict(factors: Factors, asked: object) -> list[float]:
        return [3.0 * factors.inside, 0.1 / factors.rows]

    found = fit(rows, predict, ("inside", "rows"), Factors())
    assert found.inside == pytest.approx(0.5, rel=0.02) and found.rows == pytest.approx(1 / 3, rel=0.02)
    assert found.memory == found.network == 1.0


def test_the_fitted_rows_alone_choose_the_settings() -> None:
    class Known:
        """Right with 64 images and links at half their rate; errs by the images elsewhere."""

        def __init__(self, name: str, facts: Setting) -> None:
            self.off = 0.0 if facts.micro_batch == 64 else 0.5

        def value(self, row: Row, factors: Factors) -> float:
            assert row.fitted and "ScMoE" not in row.method + row.over
            return row.value + self.off + abs(factors.inside - 0.5)

    found = choices("images", ROWS, Known)
    assert found[0].facts == {"micro_batch": 64} and len(found) == len(CANDIDATES["images"])
    assert found[0].fits["8×A30"].factors.inside == pytest.approx(0.5, rel=0.05)
    assert found[0].loss < 1 < found[1].loss


def test_factors_change_what_they_name() -> None:
    before = cluster()
    after = Factors(memory=0.5, inside=0.25, network=0.1, rows=0.2).on(before)
    assert (after.gpu.bandwidth, after.inside.rate) == (before.gpu.bandwidth / 2, before.inside.rate / 4)
    assert after.between.nic_rate == pytest.approx(before.between.nic_rate / 10)
    assert after.gpu.peak == before.gpu.peak and after.gpu.efficiency["rows"].likely == pytest.approx(0.2)
    slow = Factors(products=0.5, launch=3.0).on(before)
    assert slow.gpu.peak["bf16"] == before.gpu.peak["bf16"] / 2 and slow.gpu.launch == 3 * before.gpu.launch


def test_unfused_attention_moves_its_scores() -> None:
    simulation = Simulation("gpt2")
    work = step_work(simulation.model, Method("top-2", "topk", routed=2), Layout(8, expert_parallel=8))
    old = unfused(work, simulation.model)
    (stage,) = simulation.model.stages

    def moved(parts: tuple) -> float:
        return sum(part.bytes for part in parts if isinstance(part, Kernel) and part.kind == "pointwise")

    pairs = zip(old.pairs[0].before, work.pairs[0].before, strict=True)
    more = [moved(after.forward) - moved(before.forward) for after, before in pairs]
    scores = stage.heads * stage.span * stage.tokens
    assert sum(more) == pytest.approx(2 * 12 * 2 * scores)  # two attentions, 12 passes, 2 bytes


def test_the_record_is_what_the_page_shows() -> None:
    assert [row["value"] for row in RECORD["rows"]] == [row.value for row in ROWS]
    errors = [abs(row["simulated"] - row["value"]) for row in RECORD["rows"] if is_predicted(row)]
    assert RECORD["mean_error"] == pytest.approx(statistics.fmean(errors))
    for found in RECORD["fits"].values():
        assert len(found["free"]) <= 3
        assert all(LIMITS[name][0] <= found["factors"][name] <= LIMITS[name][1] for name in found["free"])
    for family, tried in RECORD["tried"].items():
        assert RECORD["chosen"][family] == min(tried, key=lambda each: each["loss"])["facts"]
    assert (RESULTS / "plan_paper.md").read_text("utf-8") == page(RECORD)


def test_the_record_can_be_made_again() -> None:
    """One row of the cheapest setting, with the recorded factors, to what a change of the simulation may move it."""
    recorded = next(row for row in RECORD["rows"] if row["setting"] == "llama2" and row["method"] == "ScMoE Pos-1")
    row = next(row for row in ROWS if row.setting == "llama2" and row.method == "ScMoE Pos-1")
    simulation = Simulation("llama2", replace(SETTINGS["llama2"], **RECORD["chosen"]["language"]))
    factors = Factors(**RECORD["fits"][SETTINGS["llama2"].group]["factors"])
    assert simulation.value(row, factors) == pytest.approx(recorded["simulated"], abs=0.1)


def test_claims_of_others_agree_or_not() -> None:
    shortcut = next(claim for claim in CLAIMS if claim.source == "Megatron-core #6959")
    assert agrees(shortcut, [1.1, 1.4]) and not agrees(shortcut, [1.2, 1.4])
    limit = next(claim for claim in CLAIMS if claim.is_limit and claim.published == (1.27, 1.27))
    assert agrees(limit, [1.1, 1.3]) and not agrees(limit, [1.1, 1.2])
