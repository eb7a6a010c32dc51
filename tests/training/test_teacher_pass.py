"""A teacher on disk says what the teacher in memory says, and training needs no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import DataError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.training.distillation import distil, needs_source
from tests.engine.test_distill import engine_of
from tests.models.test_converted import adapted

SAMPLES, VOCABULARY = 70, 96
MADE_OF = {"the corpus": ["abc"], "--seed": 1}


class Data:
    """As data sets of this package."""

    def __init__(self) -> None:
        self.tokens = torch.randint(VOCABULARY, (SAMPLES, 16), generator=torch.Generator().manual_seed(8))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[number]}


def section_of(model: GPT, **distill: object) -> ScMoEConfig:
    adapt = {**model.config.adapt.model_dump(), "distill": distill}  # type: ignore[union-attr]
    return ScMoEConfig(**{**model.config.model_dump(exclude={"adapt"}), "adapt": adapt})


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    connect()


def test_logits_on_disk_teach_as_those_in_memory(tmp_path: Path) -> None:
    model, data, directory = adapted("top-k"), Data(), str(tmp_path / "logits")
    section = section_of(model, teacher_logits=directory, teacher_top_n=VOCABULARY - 1, temperature=2.0)
    stored = distil(engine_of(model), section, data, 32, MADE_OF)
    live = distil(engine_of(model), section_of(model, temperature=2.0), data, 32, MADE_OF)
    assert stored is not None and live is not None
    assert stored.teacher is None and live.teacher is not None
    for samples in (range(2), range(63, 66), range(69, 70)):
        tokens = data.tokens[samples.start : samples.stop]
        losses = [
            model(tokens, tokens.roll(-1, 1), targets=each.teach(tokens, samples=samples)) for each in (stored, live)
        ]
        torch.testing.assert_close(losses[0].kl, losses[1].kl, rtol=1e-3, atol=1e-5)  # fp16
        assert losses[1].kl > 1e-3


def test_a_later_start_reads_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, directory = adapted("top-k"), Data(), tmp_path / "logits"
    section = section_of(model, teacher_logits=str(directory), teacher_top_n=4)
    distil(engine_of(model), section, data, 32, MADE_OF)
    written = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    lost = directory / "samples-000000064.safetensors"
    lost.unlink()
    passes = []
    local_logits = model.local_logits
    monkeypatch.setattr(model, "local_logits", lambda tokens: passes.append(tokens) or local_logits(tokens))
    distil(engine_of(model), section, data, 32, MADE_OF)
    assert len(passes) == 2 and torch.equal(passes[0][:6], data.tokens[64:])  # one file's
    again = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert {name for name in written if written[name] != again[name]} == {lost.name}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--seed": 2}, "made with --seed 1, but this run has 2"),
        ({"the corpus": ["xyz"]}, r"made with the corpus \['abc'\], but this run has \['xyz'\]"),
    ],
)
def test_logits_of_other_runs_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    model, data = adapted("top-k"), Data()
    section = section_of(model, teacher_logits=str(tmp_path), teacher_top_n=4)
    distil(engine_of(model), section, data, 32, MADE_OF)
    with pytest.raises(DataError, match=f"--teacher-logits {tmp_path}: {words}; name another directory"):
        distil(engine_of(model), section, data, 32, {**MADE_OF, **change})


def test_logits_of_another_base_are_refused(tmp_path: Path) -> None:
    model, data = adapted("top-k"), Data()
    distil(engine_of(model), section_of(model, teacher_logits=str(tmp_path), teacher_top_n=4), data, 32, MADE_OF)
    other = section_of(model, teacher_logits=str(tmp_path), teacher_top_n=4)
    other = other.model_copy(update={"eval_capacity_factor": 1.0})
    with pytest.raises(DataError, match="made with the section's fingerprint"):
        distil(engine_of(model), other, data, 32, MADE_OF)


@pytest.mark.parametrize("drops", [True, False])
def test_where_tokens_are_dropped_the_micro_batch_counts(drops: bool, tmp_path: Path) -> None:
    model, data = adapted("top-k"), Data()
    section = section_of(model, teacher_logits=str(tmp_path), teacher_top_n=4)
    section = section.model_copy(update={"drop_tokens": drops})
    distil(engine_of(model), section, data, 32, MADE_OF)
    if drops:
        with pytest.raises(DataError, match="made with the micro-batch size 32, but this run has 16"):
            distil(engine_of(model), section, data, 16, MADE_OF)
    else:
        distil(engine_of(model), section, data, 16, MADE_OF)


def test_the_source_is_needed_until_all_logits_are_on_disk(tmp_path: Path) -> None:
    model, data = adapted("top-k"), Data()
    section = section_of(model, teacher_logits=str(tmp_path), teacher_top_n=4)
    assert needs_source(section, SAMPLES, 32, MADE_OF)
    distil(engine_of(model), section, data, 32, MADE_OF)
    assert not needs_source(section, SAMPLES, 32, MADE_OF)
    assert needs_source(section, SAMPLES + 1, 32, MADE_OF), "a longer run"
    assert needs_source(section_of(model), SAMPLES, 32, MADE_OF), "a teacher in memory"
    assert not needs_source(section_of(model, alpha=0.0), SAMPLES, 32, MADE_OF), "no teacher"
