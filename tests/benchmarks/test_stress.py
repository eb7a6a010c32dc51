"""benchmarks.quality.stress: its variants, predictions against sums by hand, and a small run with its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality import stress, text_corpus
from benchmarks.quality.record import Record, load_plan
from benchmarks.quality.run import similarity_of
from benchmarks.quality.stress_table import adjacent_similarity, condition, frequencies, shortcuts
from benchmarks.quality.stress_table import similarity_of as between
from benchmarks.speed.frequency import RECORDS, RESULTS, Measured, operators_of, predict, read_measured
from scmoe_ds.analysis.similarity import POSITIONS, measure, verdict
from scmoe_ds.analysis.subjects import gpt_subject
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.planner.times import ChunkTimes, OperatorTime, OperatorTimes, PassTimes
from tests.helpers.exports import whole_model
from tests.helpers.tiny_quality import ITERATIONS, SEQUENCE, fork_runs, some_documents, tiny_settings

SETTINGS = Path(stress.__file__).with_suffix(".json")


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_claim_compares_two_models_of_one_condition(preset: str) -> None:
    plan = load_plan(SETTINGS, preset)
    compared = {name for scmoe, _, top2 in plan.common["claims"] for name in (scmoe, top2)}
    assert compared == set(plan.sections)
    for scmoe, _, top2 in plan.common["claims"]:
        assert condition(scmoe).startswith(condition(top2)) and plan.flags[scmoe] == plan.flags[top2]
        assert plan.sections[scmoe]["moe_every"] == plan.sections[top2]["moe_every"]
        flops = [plan.compute(name, 4096)["forward_flops_per_token"] for name in (scmoe, top2)]
        assert flops[0] == pytest.approx(flops[1], rel=0.01)
    changed = {
        (*flags.items(), section["moe_every"], section.get("shortcut_distance", 1))
        for flags, section in zip(plan.flags.values(), plan.sections.values(), strict=True)
    }
    assert len(changed) == len(plan.common["claims"])


# --- predictions


def passes(forward: float, backward: float) -> PassTimes:
    return PassTimes(forward_ms=forward, backward_ms=backward)


def measured(transfer: float) -> Measured:
    """Gate 1, encode 0, decode 1 forward; attention 4, MLP 6, shared expert 6, experts 6 (top-2: 12); backward twice."""

    def times(experts: float, transfer: float, backbone: list[OperatorTime]) -> OperatorTimes:
        chunk = ChunkTimes(
            dispatch=passes(transfer, transfer),
            experts=passes(experts, 2 * experts),
            combine=passes(transfer, transfer),
        )
        return OperatorTimes(
            gate=passes(1, 2), encode=passes(0, 0), decode=passes(1, 2), backbone=tuple(backbone), chunks={1: chunk}
        )

    backbone = [
        OperatorTime(name=name, forward_ms=ms, backward_ms=2 * ms)
        for name, ms in (("mlp", 6), ("attention", 4), ("shared", 6))
    ]
    return Measured(0.5, times(6, transfer, backbone), times(12, 2 * transfer, []))


def section(**fields: object) -> ScMoEConfig:
    return ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": 8, **fields}})


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_without_communication_only_the_computation_counts(blocks: int) -> None:
    config = section(moe_every=blocks, position="pos2" if blocks > 1 else "pos1")
    found = predict(measured(0), config, "train")
    dense = 3 * (4 * blocks + 6 * (blocks - 1))  # forward and backward
    assert found.scmoe_ms == pytest.approx(dense + 3 * (1 + 1 + 6 + 6))
    assert found.blocking_ms == found.pipelined_ms == pytest.approx(dense + 3 * (1 + 1 + 12))


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"moe_every": 1, "position": "pos1"}, "attention shared"),
        ({"moe_every": 2}, "mlp attention shared"),
        ({"moe_every": 4}, "mlp attention shared"),
        ({"moe_every": 4, "shortcut_distance": 3}, "mlp attention mlp attention mlp attention shared"),
        ({"moe_every": 2, "position": "pos3"}, "attention mlp attention shared"),
    ],
)
def test_communication_that_fits_into_the_window_is_hidden_and_no_more(fields: dict, window: str) -> None:
    config = section(**fields)
    costs = {"attention": 4, "mlp": 6, "shared": 6}
    names = [each.name for each in operators_of(measured(1), config.moe_every)]
    assert " ".join(names).endswith(window)
    # One slot for the experts: of the windows before and after it, the shorter one hides a transfer.
    parts = [costs[name] for name in window.split(" ")]
    fits = max(min(sum(parts[:slot]), sum(parts[slot:])) for slot in range(len(parts) + 1))
    assert predict(measured(fits), config, "forward").hidden == 1
    # As each operator's backward takes twice its forward, transfers are hidden there as well.
    assert predict(measured(fits), config, "train").hidden == 1
    assert predict(measured(fits + 3), config, "forward").hidden < 1
    free, loaded = (predict(measured(transfer), config, "forward") for transfer in (0, fits))
    assert loaded.scmoe_ms == pytest.approx(free.scmoe_ms)
    assert loaded.blocking_ms == pytest.approx(free.blocking_ms + 4 * fits)


@pytest.mark.parametrize("name", RECORDS)
def test_committed_records_have_the_times(name: str) -> None:
    found = read_measured(RESULTS / f"{name}.json", "train")
    assert found.share == pytest.approx(int(name.split("_")[-2]) / 100, abs=0.02)
    speedups = [
        predict(found, section(moe_every=every, position="pos1" if every == 1 else "pos2"), "train")
        for every in (1, 2, 4)
    ]
    ratios = [each.blocking_ms / each.scmoe_ms for each in speedups]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] > 1  # a rarer MoE has less to gain


def test_a_record_without_the_times(tmp_path: Path) -> None:
    content = {"links": {"train": {"share": 0.5}}, "modes": {"train": {"calibrations": {}}}}
    (tmp_path / "record.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="0 calibrations of architecture scmoe position pos2"):
        read_measured(tmp_path / "record.json", "train")


# --- runs


def test_similarity_in_the_record_is_that_of_the_analysis() -> None:
    connect()
    model = whole_model(GPTSettings(4, 16, 2, 64, 32), {"num_experts": 4}).eval()
    tokens = torch.randint(64, (5, 17), generator=torch.Generator().manual_seed(0)).numpy()
    rows = [Row(row[:-1], row[1:]) for row in tokens]
    found = similarity_of(model, rows, 2)
    whole = measure(gpt_subject(model), [torch.from_numpy(tokens[:, :-1])])
    assert found["tokens"] == 5 * 16
    assert np.abs(np.array(found["cosine"]) - whole.cosine.numpy()).max() <= 6e-5  # four decimals
    assert np.abs(np.array(found["l2"]) - whole.distance.numpy()).max() <= 6e-5


@pytest.mark.parametrize(
    ("fields", "distance"),
    [({}, 1), ({"moe_every": 4}, 1), ({"moe_every": 4}, 3), ({"moe_every": 1, "position": "pos1"}, 1)],
)
def test_a_shortcut_connects_what_the_analysis_says(fields: dict, distance: int) -> None:
    connect()
    model = whole_model(GPTSettings(4, 16, 2, 64, 32), {"num_experts": 4, **fields}).eval()
    subject = gpt_subject(model)
    whole = measure(subject, [torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))])
    judged = verdict(whole, subject.moe_blocks, distance)
    names = whole.record()["names"]
    for position in POSITIONS:
        expected = [
            (names.index(layer["from"]), names.index(layer["to"])) for layer in judged["positions"][position]["layers"]
        ]
        assert shortcuts(names, position, distance) == expected


def test_a_small_run_and_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = some_documents()
    monkeypatch.setattr(text_corpus, "installed_documents", lambda: documents)
    tiny_settings(tmp_path / "settings.json")
    whole = json.loads(SETTINGS.read_text(encoding="utf-8")) | {"extends": "settings.json"}
    whole["presets"]["cpu"] = {"evaluation": {"similarity_sequences": 6}, "flags": {"num-layers": 4}}
    (tmp_path / "stress.json").write_text(json.dumps(whole), encoding="utf-8")
    flags = [
        "--settings",
        str(tmp_path / "stress.json"),
        "--work-dir",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
        "--only",
        "post-norm",
        "fourth block, distance",
        "--seeds",
        "1",
    ]
    fork_runs(monkeypatch)
    assert stress.main([*flags, "--parallel", "2"]) == 0
    record = Record.read(tmp_path / "out.json", "benchmarks.quality.stress").content
    assert {run["variant"] for run in record["runs"]} == {
        "top-2, post-norm",
        "ScMoE, post-norm",
        "ScMoE, MoE in every fourth block, distance 3",
    }
    for run in record["runs"]:
        assert run["train"][-1][0] == 4 * SEQUENCE * ITERATIONS
        assert run["similarity"]["tokens"] == 6 * SEQUENCE and len(run["similarity"]["names"]) == 9
    assert record["variants"]["ScMoE, post-norm"]["flags"] == {"norm-placement": "post"}
    one = np.array(record["runs"][0]["similarity"]["cosine"])
    found = adjacent_similarity(record, record["runs"][0]["variant"])
    assert found == pytest.approx(np.mean([one[k, k + 1] for k in range(8)]))
    # Over three blocks, the only MoE layer's Pos-2 taps block 0's attention instead of block 2's.
    far = {run["variant"]: run for run in record["runs"]}["ScMoE, MoE in every fourth block, distance 3"]
    for distance, tap in ((1, 5), (3, 1)):
        assert between(record, far["variant"], "pos2", distance) == [far["similarity"]["cosine"][tap][7]]
    assert [config.moe_every for _, _, config in frequencies(record)] == [2, 1, 4, 4]
    text = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "| post-norm |" in text and "not decided (fewer than two seeds)" in text
    (tmp_path / "out.md").unlink()
    assert stress.main(["--from-json", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == text and (tmp_path / "out.png").exists()
