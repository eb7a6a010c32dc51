"""Training that starts from a source's weights, and that goes on from a checkpoint of its own."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint.comparison import differences
from scmoe_ds.checkpoint.tokenizer_files import describe
from scmoe_ds.config.loading import LoadedConfig, load
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.engine import connect
from scmoe_ds.errors import CheckpointError, UserError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.training.adapted_start import convert_as_saved, put_source, validate_first, with_base
from scmoe_ds.training.distillation import teacher_of
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(4, 16, 2, 320, 16)
TOKENS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(3))
FREE = {"drop_tokens": False, "use_rts": False, "min_capacity": 0}
BYTES = describe(ByteTokenizer())


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    model = whole_model(SETTINGS, {"architecture": "topk", "top_k": 2, "num_experts": 4})
    return write_export(tmp_path_factory.mktemp("source") / "export", model), model


def settings_of(path: Path, **section: Any) -> LoadedConfig:
    adapt = {"source": str(path), "layers": [1], "shared_expert": "busiest"}
    scmoe = {**FREE, "position": "pos3", "merge": "cg2", **section}
    return load(
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "scmoe": {**scmoe, "adapt": {**adapt, **section.get("adapt", {})}},
        }
    )


def engine_of(loaded: LoadedConfig) -> Any:
    model = GPT(SETTINGS, loaded.section)
    initialize_parameters(model, 9, 0.3, 4)
    return scmoe_ds.initialize(model=model, config=loaded)[0]


def with_source(section: ScMoEConfig, path: Path) -> ScMoEConfig:
    assert section.adapt is not None
    return section.model_copy(update={"adapt": section.adapt.model_copy(update={"source": str(path)})})


def step(engine: Any) -> Tensor:
    loss = engine(TOKENS, labels=TOKENS.roll(-1, 1)).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def test_it_starts_as_the_source_says_and_resumes_by_itself(source: tuple[Path, GPT], tmp_path: Path) -> None:
    path, before = source
    loaded = with_base(settings_of(path), SETTINGS, BYTES)
    assert (loaded.section.num_experts, loaded.section.top_k) == (4, 2), "as in the source"
    assert loaded.section.adapt is not None and loaded.section.adapt.base is not None
    assert load(loaded.whole).section == loaded.section, "the JSON that DeepSpeed gets says the same"
    assert loaded.section.adapt.base.model_dump() == {"architecture": "pipelined_topk", "top_k": 2, "merge": "add"}
    engine, old = engine_of(loaded), before.state_dict()
    put_source(engine, loaded.section, lambda: iter([TOKENS]))
    with torch.no_grad():
        chosen = before(TOKENS).exp_counts[1].argmax()
    moe = "runs.1.blocks.1.moe."
    shared, experts = f"{moe}mlp.", f"{moe}deepspeed_moe.experts.deepspeed_experts.{chosen}."
    for name, each in engine.module.named_parameters():
        if name.startswith(shared):
            assert torch.equal(each, old[name.replace(shared, experts)])
        elif "shortcut_norm" in name:
            assert torch.equal(each, old[name.replace("shortcut_norm", "blocks.0.attention_norm")])
        elif "coefficient" not in name:
            assert torch.equal(each, old[name]), name
    step(engine)
    description = checkpoint.describe(SETTINGS, loaded.section, 1, loaded.whole)
    checkpoint.save(engine, str(tmp_path), 1, 2, description)
    expected = [step(engine), step(engine)]
    resumed = engine_of(loaded)
    checkpoint.load(resumed, checkpoint.choose(str(tmp_path), None, False, description))
    assert torch.equal(torch.stack([step(resumed), step(resumed)]), torch.stack(expected))
    gone = settings_of(tmp_path / "gone")
    own = checkpoint.candidate(str(tmp_path), None, False)
    again = with_base(gone, SETTINGS, BYTES, own).section
    assert again == with_source(loaded.section, tmp_path / "gone"), "the checkpoint says what the source did"
    with pytest.raises(CheckpointError, match="gone is neither"):
        with_base(settings_of(tmp_path / "gone", adapt={"distill": {}}), SETTINGS, BYTES, own)
    other = checkpoint.describe(
        SETTINGS, with_base(settings_of(path, adapt={"layers": [0]}), SETTINGS, None).section, 1, {}
    )
    with pytest.raises(CheckpointError, match=r"another model: scmoe\.adapt: \{.*'layers': \[1\]\} in the checkpoint"):
        checkpoint.choose(str(tmp_path), None, False, other)


def test_a_validation_after_a_resume_runs_the_layers_of_the_last_step(source: tuple[Path, GPT]) -> None:
    path, _ = source
    loaded = with_base(settings_of(path, adapt={"layers": [1, 0], "convert_every": 2}), SETTINGS, BYTES)
    conversion = (engine := engine_of(loaded)).module.conversion
    assert conversion.converted == [1]
    for iteration, converted in ((0, [1]), (2, [1]), (3, [0, 1]), (9, [0, 1])):
        convert_as_saved(engine.module, iteration)
        assert conversion.converted == converted, iteration


def test_a_teacher_is_known_by_its_files(source: tuple[Path, GPT], tmp_path: Path) -> None:
    path, _ = source
    assert teacher_of(settings_of(path).section) == {}, "without distillation"
    copied = shutil.copytree(path, tmp_path / "elsewhere")
    other = write_export(tmp_path / "other", whole_model(SETTINGS, {"architecture": "topk", "num_experts": 8}))
    own, same, another = (
        checkpoint.describe(SETTINGS, section, 1, {}, teacher_of(section))
        for section in (settings_of(each, adapt={"distill": {}}).section for each in (path, copied, other))
    )
    assert not differences(own, same), "the same teacher at another place"
    assert [each.name for each in differences(own, another)] == ["the teacher"]
    moved = tmp_path / "moved"
    on_disk, in_memory = (
        settings_of(moved, adapt={"distill": each}).section for each in ({"teacher_logits": "logits"}, {})
    )
    known = checkpoint.Candidate(tmp_path, own, on_disk)
    assert teacher_of(on_disk, known) == {"the teacher": own["run"]["the teacher"]}
    for section, checkpoint_of_run in ((on_disk, None), (in_memory, known)):
        with pytest.raises(CheckpointError, match="moved is neither"):
            teacher_of(section, checkpoint_of_run)


class Trained:
    """What `validate_first` asks of a trainer; it validates on TOKENS."""

    valid_set = TOKENS

    def __init__(self, engine: Any) -> None:
        self.engine, self.log, self.written = engine, self, list[tuple[Any, ...]]()

    @torch.no_grad()
    def evaluate(self, data: Tensor) -> float:
        self.engine.eval()
        return float(self.engine(data, labels=data.roll(-1, 1)).lm_loss)

    def write_validation(self, *written: Any) -> None:
        self.written.append(written)


def test_the_first_validation_is_of_source_and_student(source: tuple[Path, GPT]) -> None:
    """The student is compared with one that is a ScMoE throughout, before and after which one layer is converted."""
    path, before = source
    loaded = with_base(settings_of(path, adapt={"layers": None, "shared_expert": "mean"}), SETTINGS, BYTES)
    engine = engine_of(loaded)
    put_source(engine, loaded.section, lambda: iter([TOKENS]))
    trainer = Trained(engine)
    engine.module.conversion.only([1])
    validate_first(trainer)
    assert engine.module.conversion.converted == [1]
    plain = GPT(SETTINGS, loaded.section.model_copy(update={"adapt": None}))
    plain.load_state_dict(engine.module.state_dict())
    with torch.no_grad():
        expected = [float(each.eval()(TOKENS, labels=TOKENS.roll(-1, 1)).lm_loss) for each in (plain, before)]
    ((iteration, samples, *losses),) = trainer.written
    assert (iteration, samples) == (0, 0) and losses == pytest.approx(expected, abs=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_sources_that_do_not_fit(source: tuple[Path, GPT], tmp_path: Path) -> None:
    path, _ = source
    plain = load({**settings_of(path).whole, "scmoe": dict(FREE)})
    assert with_base(plain, SETTINGS, BYTES) is plain
    other = {**BYTES, "identity": {**BYTES["identity"], "vocabulary_sha256": "0"}}
    cases: list[tuple[Any, GPTSettings, Any, str]] = [
        ({}, SETTINGS, other, r"this run's tokenizer is .*, but scmoe\.adapt\.source .* was trained with"),
        ({}, replace(SETTINGS, hidden_size=32), None, r"\(hidden_size 16 → 32\); set that as in the source"),
        ({"num_experts": 8}, SETTINGS, None, r"scmoe\.num_experts 4 → 8"),
        (
            {"adapt": {"layers": [2]}},
            SETTINGS,
            None,
            r"scmoe\.adapt\.layers = \[2\]: the model has the MoE layers 0 … 1",
        ),
        ({"adapt": {"source": str(tmp_path)}}, SETTINGS, None, r"is neither a checkpoint .* \(it is empty\)"),
        (
            {"adapt": {"shared_expert": "none"}},
            SETTINGS,
            None,
            r"shared_expert = \"none\": .* always has a shared expert",
        ),
        ({"adapt": {"base": {"top_k": 1}}}, SETTINGS, None, r"scmoe\.adapt\.base = .*: the layers of .* are .*top_k 2"),
    ]
    for section, settings, tokenizer, said in cases:
        with pytest.raises(UserError, match=said):
            with_base(settings_of(path, **section), settings, tokenizer)
