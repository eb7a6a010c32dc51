"""benchmarks.quality.compare: its variants and their compute, the corpus, statistics and verdicts, and a run that is stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from benchmarks.quality import compare as quality
from benchmarks.quality import text_corpus
from benchmarks.quality.compare import Crew, locked
from benchmarks.quality.record import QualityError, Record, load_plan
from benchmarks.quality.run import Task, curves, held_out_rows
from benchmarks.quality.table import figure, markdown, paired, verdict
from benchmarks.quality.text_corpus import (
    CorpusSettings,
    Document,
    choose,
    is_validation,
    prepare_corpus,
    site_packages_documents,
)
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import DataError
from scmoe_ds.training.record import RecordWriter, read_record
from tests.helpers.tiny_quality import ITERATIONS, SEQUENCE, fork_runs, some_documents, tiny_settings

SETTINGS = Path(quality.__file__).with_name("quality.json")
VARIANTS = list(json.loads(SETTINGS.read_text(encoding="utf-8"))["variants"])


# --- variants


@pytest.mark.parametrize(("preset", "million_tokens"), [("cpu", 0.61), ("gpu", 100)])
def test_every_variant_is_a_valid_section_at_equal_data_and_capacity(preset: str, million_tokens: float):
    plan = load_plan(SETTINGS, preset)
    assert len(plan.sections) == 18
    assert plan.tokens == pytest.approx(1e6 * million_tokens, rel=0.03)
    for variant in plan.sections:
        config = ScMoEConfig.from_deepspeed(plan.deepspeed(variant))
        config.check_model(12)
        assert (config.capacity_factor, config.aux_loss_coefficient, config.expert_parallel_size) == (2.0, 0.01, 1)
    merges = {(part["position"], part["merge"]) for name, part in plan.sections.items() if name.startswith("ScMoE Pos")}
    assert merges == {(f"pos{number}", merge) for number in (1, 2, 3) for merge in ("add", "cg1", "cg2")}


def test_compute_is_what_a_token_is_multiplied_with():
    plan = load_plan(SETTINGS, "cpu")
    flags = plan.preset["flags"]
    layers, D, S = flags["num-layers"], flags["hidden-size"], flags["seq-length"]
    E, V, moes = 8, 4096, layers // 2
    attention, mlp, norm = 4 * D * D + 4 * D, 8 * D * D + 5 * D, 2 * D
    # Norms: two a block, and the last one. Experts that a token passes: k in each MoE, one MLP in each other block.
    rest = layers * (attention + 2 * norm) + norm + V * D + moes * (mlp + D * E)
    for variant, experts, more in [
        ("top-1", 1, 0),
        ("top-2", 2, 0),
        ("top-3", 3, 0),
        ("ScMoE Pos-2 add", 2, norm),
        ("DGMoE Pos-2", 2, norm + D * E),
        ("DGMoE-Share Pos-2", 2, norm + D * E),
        ("shared expert", 2, 0),
        ("shared expert CG-2", 2, 2 * D + 2),
    ]:
        found = plan.compute(variant, V)
        assert found["active_parameters"] == rest + moes * (experts * mlp + more), variant
        scores = layers * 2 * S * D
        assert found["forward_flops_per_token"] == 2 * found["active_parameters"] + scores


def test_only_the_rows_that_the_paper_has_at_another_compute_differ_from_top_2():
    plan = load_plan(SETTINGS, "cpu")
    flops = {variant: plan.compute(variant, 4096)["forward_flops_per_token"] for variant in VARIANTS}
    unequal = {variant for variant in VARIANTS if abs(flops[variant] / flops["top-2"] - 1) > 0.01}
    assert unequal == {"top-1", "top-3", "ScMoE-2 Pos-2 CG-1"}
    assert flops["ScMoE-2 Pos-2 CG-1"] == pytest.approx(flops["top-3"], rel=0.01)


# --- corpus


def test_no_text_is_on_both_sides_and_no_copy_on_any():
    documents = some_documents()
    chosen = choose(documents, math.inf)
    assert 40 < len(chosen) <= len(documents)
    lines = chosen[0].text.splitlines()
    changed = "\n".join([*lines[: len(lines) // 4], "# another line altogether, of this file alone", *lines[-9:]])
    copies = [Document("copy", chosen[0].text), Document("near copy", changed)]
    again = choose([*copies, *documents], math.inf)
    texts = [document.text for document in again]
    assert len(set(texts)) == len(texts)
    assert sum(document.text in (chosen[0].text, changed) for document in again) == 1
    sides = {side: {text for text in texts if is_validation(text, 0.3) == side} for side in (True, False)}
    assert sides[True] and sides[False] and not sides[True] & sides[False]


def test_order_of_listing_changes_nothing():
    documents = some_documents()
    assert choose(documents[::-1], 1e5) == choose(documents, 1e5)
    assert sum(len(document.text) for document in choose(documents, 1e5)) <= 1e5


def test_files_that_nobody_wrote_for_readers_are_left_out(tmp_path: Path):
    text = "\n".join(f"A sentence with the number {number} in it, as people write." for number in range(30))
    kept = ["pack/module.py", "pack/guide.md", "pack/notes.rst", "pack/more/words.txt"]
    left_out = [
        "pack/tests/test_a.py",
        "pack/test_b.py",
        "pack/LICENSE.txt",
        "pack-1.0.dist-info/METADATA.txt",
        "pack/_vendor/other.py",
        "pack/api_pb2.py",
        "pack/table.csv",
        "pack/data/list.txt",
    ]
    for name in kept + left_out:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n{text}", encoding="utf-8")
    found = [document.name for document in site_packages_documents(tmp_path)]
    assert sorted(found) == sorted(f"site-packages/{name}" for name in kept)
    for bad in ("# Generated by a tool. DO NOT EDIT\n" + text, text + "x = '" + "y" * 500 + "'", "1, 2, 3,\n" * 300):
        assert not text_corpus.is_prose_or_code(bad)
    assert text_corpus.is_prose_or_code(text)


@pytest.mark.slow
def test_corpus_is_the_same_bytes_each_time_and_validation_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = some_documents()
    monkeypatch.setattr(text_corpus, "installed_documents", lambda: documents)
    settings = CorpusSettings(0.3, 0.2, 300)
    one, two = (prepare_corpus(tmp_path / name, settings) for name in ("one", "two"))
    for name in ("text_corpus.bin", "text_corpus.idx", "vocab.json", "merges.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one.record == two.record and one.record["vocab_size"] == 300
    chosen = choose(documents, 0.3e6)
    assert (
        one.split == f"{len(chosen) - sum(is_validation(each.text, 0.2) for each in chosen)},"
        f"{sum(is_validation(each.text, 0.2) for each in chosen)},0"
    )
    rows = held_out_rows(one.prefix, one.split, SEQUENCE, 10**6)
    tokenizer = text_corpus.GPT2BPETokenizer(*(str(tmp_path / "one" / name) for name in ("vocab.json", "merges.txt")))
    held_out = "<|endoftext|>".join([each.text for each in chosen if is_validation(each.text, 0.2)] + [""])
    read = tokenizer.detokenize([int(token) for row in rows for token in row.tokens])
    assert held_out.startswith(read[:-4]) and len(held_out) - len(read) < 40 * SEQUENCE
    assert all((row.tokens[1:] == row.labels[:-1]).all() for row in rows)
    for name in ("text_corpus.bin", "text_corpus.idx", "vocab.json", "merges.txt", "corpus.json"):
        whole = (tmp_path / "one" / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:], None):
            if damaged is None:
                (tmp_path / "one" / name).unlink()
            else:
                (tmp_path / "one" / name).write_bytes(damaged)
            assert prepare_corpus(tmp_path / "one", settings).record == one.record
            assert (tmp_path / "one" / name).read_bytes() == whole
    with pytest.raises(DataError, match="no validation document"):
        prepare_corpus(tmp_path / "three", CorpusSettings(0.3, 0.0, 300))


# --- log, statistics, verdicts


def test_record_of_two_sessions_is_one_curve(tmp_path: Path) -> None:
    def session(start: int, *steps: tuple[int, float, float]) -> None:
        writer = RecordWriter(tmp_path)
        writer.write("start", start)
        for iteration, loss, speed in steps:
            writer.write("step", iteration, lm_loss=loss, tokens_per_second=speed)

    session(0, (1, 5.0, 9.0), (2, 4.0, 100.0), (3, 3.9, 120.0))
    session(2, (3, 3.5, 9.0), (4, 3.0, 140.0))
    RecordWriter(tmp_path).write("validation", 4, lm_loss=3.25)
    assert curves(read_record(tmp_path), 10) == {
        "train": [[10, 5], [20, 4], [30, 3.5], [40, 3]],
        "validation": [[40, 3.25]],
        "tokens_per_second": 120,
        "sessions": 2,
    }


def record_of(losses: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    runs = [
        {
            "variant": name,
            "seed": seed,
            "status": "finished",
            "seconds": 1.0,
            "loss": statistics.fmean(values),
            "sequence_losses": values,
            "train": [[10, 4.0]],
            "validation": [[10, 4.0], [20, 3.0]],
            "tokens_per_second": 100,
            "sessions": 1,
            "environment": 0,
        }
        for name, by_seed in losses.items()
        for seed, values in by_seed.items()
    ]
    sizes = {"train": 10, "validation": 2}
    compute = {"forward_flops_per_token": 2e6, "active_parameters": 1e6, "parameters": 3e6}
    names = list(losses)
    return {
        "commands": ["python -m benchmarks.quality.compare"],
        "seeds": [1, 2, 3],
        "tokens": 100,
        "runs": runs,
        "identity": {
            "preset": "cpu",
            "flags": {"num-layers": 4},
            "deepspeed": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
        },
        "corpus": {"documents": sizes, "bytes": sizes, "tokens": sizes, "python": "3", "sha256": "0", "vocab_size": 9},
        "variants": {name: {"section": {}, **compute} for name in names},
        "environments": [{"device": "any"}],
        "references": [names[-1]],
        "claims": [[names[0], "<", names[-1]]],
        "equivalence_margin_nats": 0.01,
    }


def test_paired_differences_against_a_plain_computation():
    numbers = np.random.default_rng(0)
    ours, theirs = numbers.normal(3, 1, (3, 50)), numbers.normal(3.1, 1, (3, 50))
    record = record_of(
        {
            "ours": {seed: ours[seed - 1].tolist() for seed in (1, 2, 3)},
            "theirs": {seed: theirs[seed - 1].tolist() for seed in (3, 1, 2)},
        }
    )
    found = paired(record, "ours", "theirs")
    assert found is not None and found.seeds == (1, 2, 3)
    by_seed = (ours - theirs).mean(axis=1)
    assert found.by_seed == pytest.approx(by_seed)
    assert found.mean == pytest.approx(by_seed.mean())
    error = by_seed.std(ddof=1) / math.sqrt(3)
    assert found.error == pytest.approx(error)
    assert found.interval == pytest.approx((by_seed.mean() - 4.303 * error, by_seed.mean() + 4.303 * error), rel=1e-3)
    by_sequence = (ours - theirs).mean(axis=0)
    assert found.sequence_error == pytest.approx(by_sequence.std(ddof=1) / math.sqrt(50))


@pytest.mark.parametrize(
    ("differences", "relation", "expected"),
    [
        ([-0.10, -0.11, -0.12], "<", "confirmed"),
        ([0.10, 0.11, 0.12], "<", "contradicted"),
        ([-0.10, -0.30, -0.01], "<", "within noise"),  # one sign, but far apart
        ([-0.10, 0.11, -0.12], "<", "within noise"),
        ([-0.10], "<", "not decided (fewer than two seeds)"),
        ([0.001, 0.002, 0.001], "≈", "confirmed"),
        ([0.100, 0.101, 0.102], "≈", "contradicted"),
        ([-0.05, 0.02, 0.04], "≈", "within noise"),
        ([0.0], "≈", "not decided (fewer than two seeds)"),
    ],
)
def test_verdicts(differences: list[float], relation: str, expected: str):
    record = record_of(
        {
            "ours": {seed: [3 + value, 4 + value] for seed, value in enumerate(differences, 1)},
            "theirs": {seed: [3.0, 4.0] for seed in (1, 2, 3)},
        }
    )
    assert verdict(paired(record, "ours", "theirs"), relation, 0.01) == expected
    assert verdict(paired(record, "ours", "nobody"), relation, 0.01).startswith("not decided")


def test_table_marks_other_compute_missing_seeds_and_failures():
    record = record_of({"ours": {1: [3.0, 3.2], 2: [3.1, 3.3]}, "top": {1: [3.2, 3.4]}})
    record["variants"]["ours"]["forward_flops_per_token"] = 1.5e6
    record["runs"].append(
        {"variant": "top", "seed": 2, "status": "failed", "seconds": 2.0, "error": "exit code 1: …\nno"}
    )
    text = markdown(record)
    assert "| ours | 3.1500 ± 0.0707 | 23.336 | -0.2000 (0.0000) | 1.50 (-25%) |" in text
    assert "| 1 of 3, 1 failed |" in text and "- top, seed 2, after 2 s: no" in text


def test_figure_has_learning_curves_as_differences_and_a_panel_per_family():
    runs = {
        "ScMoE Pos-1 add": {1: [3.0]},
        "ScMoE Pos-1 CG-1": {1: [3.0]},
        "ScMoE-2 Pos-2 CG-1": {1: [3.0]},
        "top": {1: [3.2]},
    }
    record = record_of(runs)
    for number, run in enumerate(record["runs"]):
        run["validation"] = [[1_000_000, 3.0 + number], [2_000_000, 2.0 + number]]
    losses, *families = [axes for axes in figure(record).axes if axes.axison]
    assert {text.get_text() for text in losses.get_yticklabels()} == set(runs)
    assert [axes.get_title("left") for axes in families] == [
        "ScMoE Pos-1",
        "without a shortcut",
        "others with a shortcut",
    ]
    for axes in families:
        named = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert len(axes.lines) == 4 and len({line.get_color() for line in named.values()}) == len(named)
        for name, line in named.items():
            assert list(line.get_xdata()) == [1, 2]
            assert list(line.get_ydata()) == pytest.approx(2 * [list(runs).index(name) - list(runs).index("top")])


# --- runs


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    documents = some_documents()
    monkeypatch.setattr(text_corpus, "installed_documents", lambda: documents)
    settings = tiny_settings(tmp_path / "settings.json")
    return [
        "--settings",
        str(settings),
        "--work-dir",
        str(tmp_path / "work"),
        "--output",
        str(tmp_path / "out"),
        "--only",
        "top-2",
        "Pos-2 CG-1",
        "--seeds",
        "1",
        "2",
    ]


def stop_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process ends behind its first checkpoint, and this one is told to end while that goes on."""
    task, wait = Crew._task, Crew._wait

    def short(crew: Crew, *where: Any) -> Task:
        whole = task(crew, *where)
        return replace(whole, flags=[*whole.flags, "--exit-interval", "3"])

    def stopped(crew: Crew, path: Path, stream: IO[str]) -> int:
        code = wait(crew, path, stream)
        os.kill(os.getpid(), signal.SIGTERM)
        assert crew.stopping.wait(60)
        return code

    monkeypatch.setattr(Crew, "_task", short)
    monkeypatch.setattr(Crew, "_wait", stopped)


def test_two_variants_with_two_seeds_stopped_and_resumed(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = [flag if flag != "Pos-2 CG-1" else "ScMoE Pos-2 CG-1" for flag in flags]
    with monkeypatch.context() as patch:
        stop_first_run(patch)
        assert quality.main(flags) == 130
    assert not Record.read(tmp_path / "out.json", "benchmarks.quality.compare").content["runs"]
    assert quality.main([*flags, "--budget-minutes", "1e-9"]) == 1  # nothing starts after the time is over
    fork_runs(monkeypatch)
    assert quality.main([*flags, "--parallel", "2"]) == 0
    record = Record.read(tmp_path / "out.json", "benchmarks.quality.compare").content
    runs = {(run["variant"], run["seed"]): run for run in record["runs"]}
    assert set(runs) == {(name, seed) for name in ("top-2", "ScMoE Pos-2 CG-1") for seed in (1, 2)}
    assert sorted(run["sessions"] for run in runs.values()) == [1, 1, 1, 2]
    for run in runs.values():
        assert run["status"] == "finished" and len(run["sequence_losses"]) == 12
        assert run["loss"] == pytest.approx(statistics.fmean(run["sequence_losses"]))
        assert [tokens for tokens, _ in run["train"]] == [4 * SEQUENCE * step for step in range(1, ITERATIONS + 1)]
        assert 4 < run["loss"] < math.log(384) + 0.5
    curves = {pair: np.array(run["train"])[:, 1] for pair, run in runs.items()}
    # Models that have learned next to nothing differ little on the same batches, and much on others.
    for seed in (1, 2):
        apart = abs(curves["top-2", seed] - curves["ScMoE Pos-2 CG-1", seed]).mean()
        assert apart < abs(curves["top-2", 1] - curves["top-2", 2]).mean() / 4

    before = (tmp_path / "out.md").read_text(encoding="utf-8")
    (tmp_path / "out.md").unlink()
    assert quality.main(["--from-json", str(tmp_path / "out.json")]) == 0
    assert (tmp_path / "out.md").read_text(encoding="utf-8") == before
    assert str(tmp_path) not in json.dumps([record["corpus"], record["identity"]])


def test_a_failed_run_stays_in_the_record_and_can_be_run_again(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    codes = iter([1, 1, 1, 1, 0])

    def wait(crew: Crew, path: Path, stream: IO[str]) -> int:
        code = next(codes)
        stream.write(f"error {code}\n")
        stream.flush()
        if code == 0:
            result = Path(json.loads(path.read_text(encoding="utf-8"))["result"])
            result.write_text(json.dumps({"sequence_losses": [3.0, 4.0]}), encoding="utf-8")
            RecordWriter(path.parent / "checkpoints").write("start", 0)
        return code

    monkeypatch.setattr(Crew, "_wait", wait)
    assert quality.main(flags[:-1]) == 1  # seed 1
    states = [run["status"] for run in Record.read(tmp_path / "out.json", "benchmarks.quality.compare").content["runs"]]
    assert states == ["failed"] * len(states) and len(states) == 3  # of all variants that have a part
    assert quality.main(flags[:-1]) == 1
    assert len(Record.read(tmp_path / "out.json", "benchmarks.quality.compare").content["runs"]) == len(states)
    only = [*flags[:6], "--only", "top-2", "--seeds", "1", "--retry-failed"]
    assert [quality.main(only), quality.main(only)] == [1, 0]
    runs = [
        run
        for run in Record.read(tmp_path / "out.json", "benchmarks.quality.compare").content["runs"]
        if run["variant"] == "top-2"
    ]
    assert [run["status"] for run in runs] == ["failed", "failed", "finished"]
    assert "error 1" in runs[0]["error"]


# --- bad input


def test_unknown_names_and_files_are_explained(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = json.loads(Path(flags[1]).read_text(encoding="utf-8"))
    cases = {
        "no variant has it in its name; there are top-1": ["--only", "top-7"],
        "--preset tpu: ": ["--preset", "tpu"],
        "is not a record of benchmarks.quality.compare": ["--from-json", flags[1]],
        "nothing.json cannot be read": ["--from-json", str(tmp_path / "nothing.json")],
        "other.json is a record of benchmarks.quality.stress, not of": ["--from-json", str(tmp_path / "other.json")],
    }
    other = {"benchmark": "benchmarks.quality.stress", "identity": {}, "corpus": {}, "variants": {}, "runs": []}
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    for message, more in cases.items():
        assert quality.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    changes: dict[str, dict[str, Any]] = {
        'variant top-1: scmoe.architecture = "topp"': {
            "variants": settings["variants"] | {"top-1": {"architecture": "topp"}}
        },
        "name top-9, which is no variant": {"claims": [["top-1", "<", "top-9"]]},
        "it can say < or ≈": {"claims": [["top-1", ">", "top-2"]]},
        "variant top-1: --seq-length decides the data, which all variants share": {
            "variants": settings["variants"] | {"top-1": {"flags": {"seq-length": 8}}}
        },
    }
    for message, change in changes.items():
        Path(flags[1]).write_text(json.dumps(settings | change), encoding="utf-8")
        assert quality.main(flags) == 2
        assert message in capsys.readouterr().err


def test_a_record_of_another_configuration_is_refused(tmp_path: Path):
    settings = tiny_settings(tmp_path / "settings.json")
    corpus = {"sha256": "a", "settings": {}, "tokens": {}, "vocab_size": 300}

    def open_with(change: dict[str, Any] | None = None, **parts: Any) -> Record:
        plan = load_plan(settings, "cpu")
        plan.preset["flags"] |= change or {}
        return Record.open(tmp_path / "record.json", plan, {**corpus, **parts}, "benchmarks.quality.compare")

    record = open_with()
    record.add({"variant": "top-1", "seed": 1, "status": "failed", "seconds": 1.0, "error": "x", "environment": 0})
    assert not open_with().lacks("top-1", 1) and open_with().lacks("top-1", 1, retry_failed=True)
    with pytest.raises(QualityError, match=r"its flags.train-iters is 6, now it is 7; give another --output"):
        open_with({"train-iters": 7})
    with pytest.raises(QualityError, match=r'its corpus.sha256 is "a", now it is "b"'):
        open_with(sha256="b")
    whole = json.loads(settings.read_text(encoding="utf-8"))
    whole["variants"]["top-1"]["top_k"] = 2
    settings.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(QualityError, match=r"its variant top-1.top_k is 1, now it is 2"):
        open_with()


def test_two_benchmarks_do_not_share_a_directory(tmp_path: Path):
    with locked(tmp_path), pytest.raises(QualityError, match="another process works in"), locked(tmp_path):
        pass


def test_checkpoints_of_other_sizes_are_elsewhere():
    plan = load_plan(SETTINGS, "cpu")
    corpus = {"sha256": "a", "settings": {}, "tokens": {}}
    other = replace(plan, preset={**plan.preset, "flags": {**plan.preset["flags"], "train-iters": 7}})
    assert len({plan.fingerprint(corpus), other.fingerprint(corpus), plan.fingerprint({**corpus, "sha256": "b"})}) == 3
