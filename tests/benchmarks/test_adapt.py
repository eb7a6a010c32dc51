"""benchmarks.quality.adapt: its runs and their order, the entropies, verdicts and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.quality import adapt
from benchmarks.quality.adapt_figure import figure
from benchmarks.quality.adapt_plan import AdaptPlan, load_plan, teacher_name
from benchmarks.quality.adapt_table import below, markdown, over_teacher
from benchmarks.quality.entropy import entropies
from benchmarks.quality.record import QualityError
from benchmarks.quality.text_corpus import Corpus
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.indexed_writer import write_indexed_dataset

SETTINGS = Path(adapt.__file__).with_suffix(".json")
QWEN, GPT = "Qwen3-MoE", "top-2 GPT"


@pytest.fixture
def plan() -> AdaptPlan:
    return load_plan(SETTINGS, "cpu")


def test_every_section_is_valid_and_students_train_on_a_tenth(plan: AdaptPlan):
    for name, run in plan.runs.items():
        whole: dict[str, Any] = {"scmoe": plan.section(run)}
        if run.is_hugging_face:
            whole["expert_parallel"] = {"enabled": True, "autoep_size": 1}
        config = ScMoEConfig.from_deepspeed(whole)
        assert config.has_shortcut == (run.conversion is not None), name
        assert (config.adapt is not None) == (run.conversion is not None and not run.recipe.get("scratch")), name
        if "20 %" not in name and not run.is_teacher and not run.recipe.get("scratch"):
            assert 0.09 < run.steps / plan.runs[teacher_name(run.teacher)].steps <= 0.1, name


def test_teachers_come_first_and_a_line_has_all_seeds_before_the_next(plan: AdaptPlan):
    order = plan.order(list(plan.runs), [1, 2])
    assert [plan.runs[name].is_teacher for name, _ in order[:5]] == [True] * 4 + [False]
    assert [seed for _, seed in order[:4]] == [1, 1, 2, 2]  # of seed 1 the students can begin
    assert [name.partition(": ")[2] for name, _ in order[4:12]] == ["trained on"] * 4 + ["Pos-1, distilled"] * 4
    assert not any(run.teacher == QWEN for name, run in plan.runs.items() if "Pos-2" in name)


@pytest.mark.parametrize("line", ["Pos-9, distilled", "Pos-1, by magic", "Pos-1"])
def test_an_order_that_names_no_run(tmp_path: Path, line: str):
    whole = json.loads(SETTINGS.read_text(encoding="utf-8"))
    whole["presets"]["cpu"]["students"]["order"].append(line)
    path = tmp_path / "adapt.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(QualityError, match=f"order: {line} is no conversion"):
        load_plan(path, "cpu")


def test_entropies_of_a_cycle(tmp_path: Path):
    corpus = Corpus(tmp_path, {"documents": {"train": 3, "validation": 1}, "vocab_size": 4})
    write_indexed_dataset(corpus.prefix, [list(np.arange(4000) % 4)] * 4, 4)
    found = entropies(corpus)
    assert found["unigram"] == pytest.approx(math.log(4), abs=1e-6)
    assert found["bigram of their own"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["bigram"] < 0.1  # the prior's share


def a_record(plan: AdaptPlan, over: float, noise: float) -> dict[str, Any]:
    """Students at Pos-1 are `over` above the teacher trained on, by seed ± `noise`; fine-tuned ones 0.1 nats more."""

    def run(name: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
        wave = [loss - 0.1, loss + 0.1]
        return {"variant": name, "seed": seed, "status": "finished", "loss": loss, "sequence_losses": wave, **more}

    runs = []
    for seed in (1, 2, 3):
        runs += [run(teacher_name(QWEN), seed, 4.0 + seed), run(f"{QWEN}: trained on", seed, 3.9 + seed)]
        student = (3.9 + seed) * (1 + over + noise * (seed - 2))
        more = {"before": [9.0, 9.0], "on_the_way": {"30": [5.0]}, "processor_seconds": 60.0}
        runs += [run(f"{QWEN}: Pos-1, distilled", seed, student, **more)]
        runs += [run(f"{QWEN}: Pos-1, fine-tuned", seed, student + 0.1, **more)]
        runs += [run(f"{QWEN}: Pos-1, distilled, KL alone", seed, student + 0.01, **more)]
    corpus = {"sha256": "0" * 64, "settings": {}, "vocab_size": 1024, "python": "3.11"}
    corpus |= {"tokens": {"train": 10, "validation": 5}}
    return {
        "commands": ["python -m benchmarks.quality.adapt"],
        "environments": [{"device": "a CPU"}],
        "seeds": [1, 2, 3],
        "identity": plan.identity(corpus),
        "corpus": corpus,
        "variants": plan.variants(1024),
        "entropies": {"unigram": 5.9, "bigram": 4.0, "bigram of their own": 3.5},
        "runs": runs,
        **plan.common,
    }


@pytest.mark.parametrize(
    ("over", "noise", "expected"),
    [(0.002, 0.001, "confirmed"), (0.02, 0.001, "contradicted"), (0.009, 0.005, "within noise")],
)
def test_verdict_on_one_per_cent(plan: AdaptPlan, over: float, noise: float, expected: str):
    record = a_record(plan, over, noise)
    found = over_teacher(record, f"{QWEN}: Pos-1, distilled")
    assert found is not None and found.mean == pytest.approx(over)
    assert below(found, record["within"]) == expected
    assert over_teacher(record, f"{QWEN}: Pos-1, distilled, 20 %") is None  # its teacher was not trained on as long
    page = markdown(record)
    assert f"within 1 % of the teacher trained on as long | {expected} | " in page
    assert (
        "| Qwen3-MoE: Pos-1, distilled, ends lower than fine-tuned, nats per token | confirmed | -0.1000 ± 0.0000"
        in page
    )
    assert "| Qwen3-MoE: Pos-1 | KL alone | +0.0100 ± 0.0000" in page
    assert "| top-2 GPT: Pos-1, distilled, ends lower than fine-tuned, nats per token | not decided" in page
    # Before: 9 minus the teacher's 5, 6 and 7; on the way: 5 minus the first sequences' 4.9, 5.9 and 6.9.
    assert "+3.0000 ± 0.5774 | 2 %: -0.9000 ± 0.5774" in page


def test_figure_has_a_panel_for_each_teacher_and_skips_what_is_not_there(plan: AdaptPlan):
    drawn = figure(a_record(plan, 0.002, 0.001))
    assert [axes.get_title(loc="left") for axes in drawn.axes] == [QWEN, GPT]
    assert [line.get_label() for line in drawn.axes[0].lines[:3]] == [
        "trained on",
        "Pos-1, distilled",
        "Pos-1, fine-tuned",
    ]
    np.testing.assert_allclose(drawn.axes[0].lines[1].get_xdata(), [100 * 30 / 1536, 100 * 150 / 1536])
    assert len(drawn.axes[1].lines) == 1
