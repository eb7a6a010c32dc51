"""A resume with other settings than the checkpoint's: what holds, what is refused, what is said; one process."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import scmoe_ds
from scmoe_ds import checkpoint
from scmoe_ds.checkpoint import comparison, failure_notes, loading
from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint.comparison import Outcome, differences, outcome_of, run_settings
from scmoe_ds.checkpoint.hyperparameters import OwnSettings
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.dataset import identify
from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.data.splits import split_shares
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program
from scmoe_ds.programs import pretrain_swin as pretrain_swin_program
from tests.helpers.json_files import changed

ROOT = Path(__file__).parents[2]
SETTINGS = GPTSettings(2, 16, 2, 32, 16, hidden_dropout=0.0, attention_dropout=0.0)
ADAM = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "torch_adam": True}
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": ADAM},
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 1},
    "scmoe": {"num_experts": 4, "overlap": {"calibration_steps": 0}},
}
DECAY = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 3, "total_num_steps": 40}}
TOKENS = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


# --- the table


def described(whole: dict[str, Any] = JSON, settings: GPTSettings = SETTINGS, **flags: Any) -> dict[str, Any]:
    defaults = {
        "seed": 1,
        "split": split_shares("8,1,1"),
        "seq_length": 16,
        "train_iters": 10,
        "valid_data_path": None,
        "micro_batch_size": 2,
        "accumulation_steps": 2,
        "replicas": 1,
        "data": {"content": ["aa"], "shown": "here"},
    }
    config = ScMoEConfig.from_deepspeed(whole)
    return fields.describe(settings, config, 1, whole, run_settings(whole, **{**defaults, **flags}))


def test_every_setting_has_an_outcome() -> None:
    """A field that somebody adds must be entered in the table, or among those that bind a checkpoint."""
    swin = {field.name for field in dataclasses.fields(SwinSettings)} - {"head_size"}
    gpt = {field.name for field in dataclasses.fields(GPTSettings)}
    free = (gpt | swin) & fields.FREE_MODEL_FIELDS
    assert free == fields.FREE_MODEL_FIELDS
    names = ["--" + name.replace("_", "-") for name in free]
    names += [f"scmoe.{name}" for name in ScMoEConfig.model_fields if name not in fields.BINDING_SECTION_FIELDS]
    names += list(described()["run"])
    for name in names:
        assert any(comparison.fnmatchcase(name, pattern) for pattern in comparison.TABLE), name


def test_nothing_is_said_when_nothing_differs() -> None:
    other_layout = changed(JSON, scmoe__expert_parallel_size=2, zero_optimization__stage=2, scmoe__dispatch="padded")
    moved = {"content": ["aa"], "shown": "elsewhere"}
    now = described(other_layout, data=moved, split=split_shares("80, 10, 10"), accumulation_steps=1, replicas=2)
    assert differences(json.loads(json.dumps(described())), now) == []
    former_words = json.loads(json.dumps(described()))
    former_words["scmoe"]["gate_softmax"] = "before_topk"
    assert differences(former_words, described()) == []
    before_the_record = {key: value for key, value in described().items() if key != "run"}
    assert differences(before_the_record, described(changed(JSON, optimizer__params__lr=1.0), seed=3)) == []


CHANGES: dict[str, tuple[dict, dict, str, Outcome]] = {
    "lr": ({"optimizer__params__lr": 1e-5}, {}, "optimizer.params.lr = 1e-05 (was 0.01)", Outcome.TAKEN_OVER),
    "key gone": (
        {"optimizer__params__eps": None},
        {},
        "optimizer.params.eps = not set (was 1e-06)",
        Outcome.TAKEN_OVER,
    ),
    "Adam": ({"optimizer__type": "Adam"}, {}, "", Outcome.FREE),
    "optimizer": (
        {"optimizer": {"type": "SGD", "params": {}}, "zero_allow_untested_optimizer": True},
        {},
        'optimizer.type = "SGD" (was "AdamW")',
        Outcome.REFUSED,
    ),
    "schedule": (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        {},
        'scheduler.type = "WarmupLR" (was not set)',
        Outcome.TAKEN_OVER,
    ),
    "clipping": ({"gradient_clipping": 0.1}, {}, "gradient_clipping = 0.1 (was 0.5)", Outcome.TAKEN_OVER),
    "capacity": ({"scmoe__capacity_factor": 1.25}, {}, "scmoe.capacity_factor = 1.25 (was 2.0)", Outcome.TAKEN_OVER),
    "accumulation": ({}, {"accumulation_steps": 4}, "sequences per step = 8 (was 4)", Outcome.CHANGES_THE_RUN),
    "micro-batch": (
        {},
        {"micro_batch_size": 4, "accumulation_steps": 1},
        "train_micro_batch_size_per_gpu = 4 (was 2)",
        Outcome.CHANGES_THE_RUN,
    ),
    "seed": ({}, {"seed": 7}, "--seed = 7 (was 1)", Outcome.CHANGES_THE_RUN),
    "split": (
        {},
        {"split": split_shares("5,4,1")},
        "--split = [0.5, 0.4, 0.1] (was [0.8, 0.1, 0.1])",
        Outcome.CHANGES_THE_RUN,
    ),
    "length": ({}, {"seq_length": 8}, "--seq-length = 8 (was 16)", Outcome.CHANGES_THE_RUN),
    "iterations": ({}, {"train_iters": 50}, "--train-iters = 50 (was 10)", Outcome.CHANGES_THE_RUN),
    "validation": (
        {},
        {"valid_data_path": {"content": ["cc"], "shown": "v"}},
        "--valid-data-path = v [cc] (was not set)",
        Outcome.CHANGES_THE_RUN,
    ),
    "autocast": (
        {"torch_autocast": {"enabled": True}},
        {},
        "torch_autocast.enabled = true (was not set)",
        Outcome.TAKEN_OVER,
    ),
    "data": (
        {},
        {"data": {"content": ["bb"], "shown": "there"}},
        "data = there [bb] (was here [aa])",
        Outcome.CHANGES_THE_RUN,
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_differences(case: str) -> None:
    json_changes, flags, text, outcome = CHANGES[case]
    found = differences(json.loads(json.dumps(described())), described(changed(JSON, **json_changes), **flags))
    assert [str(each) for each in found[:1]] == ([text] if text else [])
    assert all(each.outcome is outcome for each in found[:1])
    assert len(found) <= 1 or case == "optimizer", "all of its parameters are gone then"
    assert outcome_of("scheduler.params.total_num_steps") is outcome_of("of tomorrow") is Outcome.CHANGES_THE_RUN


def test_data_is_what_is_in_the_files(tmp_path: Path) -> None:
    def write(name: str, first: int) -> str:
        return write_indexed_dataset(str(tmp_path / name), [[first, *range(40)]] * 5, 257).prefix

    one, two = write("one", 1), write("two", 2)
    shutil.copy(one + ".bin", tmp_path / "moved.bin")
    shutil.copy(one + ".idx", tmp_path / "moved.idx")
    content = {
        path: identify(path.split())["content"]
        for path in (
            one,
            two,
            str(tmp_path / "moved"),
            f"2 {one} 6 {two}",
            f"0.25 {one} 0.75 {two}",
            f"1 {one} 1 {two}",
            f"5 {one}",
        )
    }
    assert content[one] == content[str(tmp_path / "moved")] == content[f"5 {one}"]
    assert content[one] != content[two], "the same lengths, other tokens: the index alone does not tell"
    assert content[f"2 {one} 6 {two}"] == content[f"0.25 {one} 0.75 {two}"] != content[f"1 {one} 1 {two}"]


# --- what is taken over, in an engine, by both ways of loading


def make_engine(whole: dict[str, Any], seed: int = 1) -> Any:
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, seed, 0.02, SETTINGS.num_layers)
    return scmoe_ds.initialize(model=model, config=whole)[0]


def step(engine: Any, times: int = 1) -> None:
    for _ in range(times):
        for _ in range(2):
            engine.backward(engine(TOKENS, labels=TOKENS).loss)
            engine.step()


def save_after(steps: int, whole: dict[str, Any], directory: Path) -> Any:
    engine = make_engine(whole)
    step(engine, steps)
    checkpoint.save(engine, str(directory), steps, 4 * steps, described(whole))
    return engine


def resume(directory: Path, whole: dict[str, Any], by_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    if by_pieces:
        monkeypatch.setattr(loading, "_deepspeed_can_read", lambda layout: False)
    engine = make_engine(whole, seed=2)
    checkpoint.load(engine, checkpoint.choose(str(directory), None, False, described(whole)))
    return engine


def groups(engine: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


@pytest.mark.parametrize("by_pieces", [False, True])
def test_the_jsons_optimizer_holds(
    by_pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_after(3, JSON, tmp_path)
    new = changed(
        JSON,
        optimizer__params__lr=1e-7,
        optimizer__params__betas=[0.5, 0.6],
        optimizer__params__eps=1e-3,
        optimizer__params__weight_decay=0.3,
        gradient_clipping=0.25,
    )
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        engine = resume(tmp_path, new, by_pieces, monkeypatch)
    assert groups(engine) == groups(make_engine(new)), "each group's own: no decay stays without, experts stay experts"
    assert [group["weight_decay"] for group in groups(engine)] == [0.3, 0.0, 0.3, 0.0]
    assert engine.optimizer.clip_grad == 0.25
    before = weights(engine)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(saved).items())
    assert all(
        torch.equal(old["exp_avg"], new["exp_avg"]) and old["step"] == new["step"] == 3
        for old, new in zip(
            saved.optimizer.optimizer.state.values(), engine.optimizer.optimizer.state.values(), strict=True
        )
    )
    step(engine)
    # At its start (bias correction 1 / (1 - 0.5^4)) Adam's step is a few learning rates at most.
    moved = max(float((weight - before[name]).abs().max()) for name, weight in weights(engine).items())
    assert 0 < moved < 1e-6, "the learning rate of the JSON, not the checkpoint's 1e-2"
    log = [record.getMessage() for record in caplog.records]
    taken_over = next(line for line in log if "of this run, not of the checkpoint" in line)
    assert "optimizer.params.lr = 1e-07 (was 0.01)" in taken_over and "gradient_clipping = 0.25 (was 0.5)" in taken_over
    assert any(
        line.endswith("learning rate of the next step: 1e-07; by the checkpoint's settings 0.01") for line in log
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def sixth_rate(peak: float = 1e-2, total: int = 40) -> float:
    """The learning rate of the sixth step, behind three steps of warm-up: DeepSpeed counts it as 4."""
    return peak * (total - 4) / (total - 3)


SCHEDULES: dict[str, tuple[Any, Any, float]] = {
    "unchanged": (DECAY, DECAY, sixth_rate()),
    "other peak": (DECAY, changed(DECAY, params__warmup_max_lr=1e-4), sixth_rate(1e-4)),
    "longer": (DECAY, changed(DECAY, params__total_num_steps=400), sixth_rate(total=400)),
    "new": (None, DECAY, sixth_rate()),
    "gone": (DECAY, None, 1e-2),
}


@pytest.mark.parametrize("by_pieces", [False, True])
@pytest.mark.parametrize("case", SCHEDULES)
def test_the_jsons_schedule_holds(case: str, by_pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then, now, rate = SCHEDULES[case]
    old = JSON if then is None else {**JSON, "scheduler": then}
    new = JSON if now is None else {**JSON, "scheduler": now}
    save_after(5, old, tmp_path)
    engine = resume(tmp_path, new, by_pieces, monkeypatch)
    assert engine.get_lr() == pytest.approx([rate] * 4)
    whole_run = make_engine(new)
    step(whole_run, 7)
    step(engine, 2)
    assert engine.get_lr() == pytest.approx(whole_run.get_lr()), "and so it goes on"


def test_a_schedule_of_torch_holds(tmp_path: Path) -> None:
    """Only a client can have one under ZeRO. Each of its rates follows from the one before."""

    def make(whole: dict[str, Any]) -> Any:
        model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
        halved = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
        return scmoe_ds.initialize(model=model, config=whole, lr_scheduler=halved)[0]

    engine = make(JSON)
    step(engine, 3)
    checkpoint.save(engine, str(tmp_path), 3, 12, described())
    for whole, rate in ((JSON, 1e-2 / 8), (changed(JSON, optimizer__params__lr=1.0), 1 / 8)):
        engine = make(whole)
        checkpoint.load(engine, checkpoint.choose(str(tmp_path), None, False, described(whole)))
        assert engine.get_lr() == pytest.approx([rate] * 4)
        step(engine)
        assert engine.get_lr() == pytest.approx([rate / 2] * 4)


def test_a_schedule_bent_by_train_iters_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_after(5, {**JSON, "scheduler": DECAY}, tmp_path)
    longer = {**JSON, "scheduler": changed(DECAY, params__total_num_steps=400)}
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        engine = make_engine(longer)
        checkpoint.load(engine, checkpoint.choose(str(tmp_path), None, False, described(longer, train_iters=400)))
    warning = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warning) == 1 and warning[0].endswith(
        "differs from the one that saved it: "
        "scheduler.params.total_num_steps = 400 (was 40); --train-iters = 400 (was 10)"
    )


def test_a_loss_scale_is_taken_over() -> None:
    """No fp16 on CPU: an engine's attributes alone."""
    fixed, dynamic = SimpleNamespace(cur_scale=1024.0), SimpleNamespace(cur_scale=65536.0)
    optimizer = SimpleNamespace(loss_scaler=dynamic, dynamic_loss_scale=True, clip_grad=1.0)
    own = OwnSettings(SimpleNamespace(optimizer=optimizer))
    optimizer.loss_scaler, optimizer.dynamic_loss_scale = fixed, False  # as a checkpoint's loader does
    own.put_back_loss_scale()
    assert optimizer.loss_scaler == dynamic and optimizer.dynamic_loss_scale


def test_steps_of_deepspeeds_adam_are_counted_on_by_torchs() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.9), weight_decay=0.0)
    own = OwnSettings(SimpleNamespace(optimizer=optimizer))
    del optimizer.param_groups[0]["amsgrad"]  # DeepSpeed's has none
    optimizer.state[weight] = {"step": 1, "exp_avg": torch.full((3,), 0.1), "exp_avg_sq": torch.full((3,), 0.1)}
    own.fit_implementation()
    weight.grad = torch.ones(3)
    optimizer.step()
    # Gradients of 1 from the start: both corrected moments are 1, and the step is the learning rate.
    assert torch.allclose(weight, torch.full((3,), 0.9)) and optimizer.state[weight]["step"] == 2


# --- the programs

FLAGS = {
    "--num-layers": "2",
    "--hidden-size": "16",
    "--num-attention-heads": "2",
    "--seq-length": "16",
    "--train-iters": "8",
    "--eval-iters": "1",
    "--split": "8,1,1",
    "--log-interval": "1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 300).tolist() for _ in range(20)]
    return write_indexed_dataset(str(tmp_path_factory.mktemp("data") / "data"), documents, 257).prefix


class Program:
    """pretrain_gpt_scmoe.py in this process; paths are relative to the directory."""

    def __init__(self, directory: Path, data: str, capfd: pytest.CaptureFixture) -> None:
        self.directory, self.data, self.capfd = directory, data, capfd

    def __call__(self, *flags: str, expect: int = 0, **json_changes: Any) -> str:
        """Runs it; returns what it printed."""
        file = self.directory / "ds.json"
        file.write_text(json.dumps(changed(JSON, **json_changes)))
        words = [word for name, value in FLAGS.items() for word in (name, value)]
        self.capfd.readouterr()
        code = pretrain_gpt_program.main([*words, "--deepspeed_config", str(file), "--data-path", self.data, *flags])
        printed = self.capfd.readouterr()
        text = printed.out + printed.err
        assert code == expect, text
        assert "Traceback" not in text and len(re.findall("pretrain_gpt_scmoe.py: error: ", text)) == (expect == 2)
        return text

    def steps(self, directory: str) -> list[int]:
        return sorted(int(path.name[11:]) for path in (self.directory / directory).glob("global_step*"))


@pytest.fixture
def pretrain(tmp_path: Path, data: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    return Program(tmp_path, data, capfd)


def test_load_of_nothing_is_an_error(pretrain: Program, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, reason in {"absent": "no such directory", "empty": "it is empty"}.items():
        text = pretrain("--load", name, "--save", "run", "--exit-interval", "1", expect=2)
        assert re.search(rf"--load {name} is neither .* \({reason}\); correct the path, or leave --load out", text)
        assert not pretrain.steps("run")
    # The remedy: leave it out; or one command line for start and restart.
    pretrain("--save", "run", "--exit-interval", "1")
    start = ("--save", "other", "--auto-resume", "--exit-interval", "1")
    assert "other has no checkpoint to go on from: this run starts from scratch" in pretrain(*start)
    text = pretrain(*start)
    assert "--auto-resume other/global_step1: loaded, iteration 1, 4 samples read" in text
    assert "scratch" not in text and "differs" not in text and "of this run" not in text, "nothing differs"


def test_load_without_latest_and_save_over_another_run(pretrain: Program, tmp_path: Path) -> None:
    pretrain("--save", "run", "--save-interval", "1", "--exit-interval", "3")
    (tmp_path / "run/latest").unlink()
    text = pretrain("--load", "run", "--save", "run", expect=2)
    assert "--load run: has no file latest; name one of its checkpoints, e.g. --load run/global_step3;" in text
    text = pretrain("--save", "run", expect=2)
    assert "--save run: holds checkpoints of another run (global_step3, …)" in text
    text = pretrain("--load", "run/global_step2", "--save", "run", "--exit-interval", "1")
    assert "from iteration 2" in text and "run also holds newer checkpoints (global_step3)" in text, "a remedy works"
    pretrain("--save", "elsewhere", "--exit-interval", "1")
    assert "from iteration 3" in pretrain("--save", "run", "--auto-resume", "--exit-interval", "1"), (
        "and so do the others"
    )
    text = pretrain("--load", "elsewhere", "--save", "run", expect=2)
    assert "holds checkpoints of another run" in text
    # What is there and cannot be used is not "nothing there".
    for path in tmp_path.glob("run/global_step*/scmoe_files.json"):
        path.unlink()
    text = pretrain("--save", "run", "--auto-resume", "--load", "elsewhere", expect=2)
    assert "--auto-resume: run has checkpoints, but none can be used (global_step4, global_step3," in text
    (tmp_path / "run").rename(tmp_path / "away")
    assert "from iteration 1" in pretrain(
        "--save", "run", "--auto-resume", "--load", "elsewhere", "--exit-interval", "1"
    )


def test_another_optimizer_is_refused_and_its_remedy_works(pretrain: Program, tmp_path: Path) -> None:
    sgd: dict[str, Any] = {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}, "zero_allow_untested_optimizer": True}
    pretrain("--save", "run", "--exit-interval", "2")
    text = pretrain("--save", "run", "--auto-resume", expect=2, **sgd)
    pattern = (
        r'error: optimizer\.type = "SGD": the optimizer state in --auto-resume (\S+) is of "AdamW"; set it back, or'
    )
    assert re.search(pattern, text)
    command = re.search(r"scmoe (convert) export (\S+) OUT, then --load OUT and another --save", text)
    assert command is not None
    from scmoe_ds.programs.convert import main as convert

    assert convert(["export", command[2], "OUT"]) == 0
    text = pretrain("--load", "OUT", "--save", "another", "--exit-interval", "1", **sgd)
    assert "from iteration 0" in text and pretrain.steps("another") == [1]


def test_what_changes_a_run_is_one_warning(pretrain: Program) -> None:
    pretrain("--save", "run", "--exit-interval", "2")
    text = pretrain(
        "--save",
        "run",
        "--auto-resume",
        "--exit-interval",
        "1",
        "--seed",
        "7",
        "--split",
        "5,4,1",
        "--train-iters",
        "9",
        gradient_accumulation_steps=1,
    )
    [line] = [line for line in text.splitlines() if "differs" in line]
    for part in (
        "--seed = 7 (was 1234)",
        "--split = [0.5, 0.4, 0.1] (was [0.8, 0.1, 0.1])",
        "--train-iters = 9 (was 8)",
        "sequences per step = 2 (was 4)",
    ):
        assert part in line


def test_smaller_steps_find_data_to_the_end(pretrain: Program, tmp_path: Path) -> None:
    """4 sequences for 6 steps, then 2 for 2 more: the run reads 28, not 8 · 2."""
    pretrain("--save", "run", "--exit-interval", "6")
    (tmp_path / "run/global_step6").rename(tmp_path / "renamed")
    text = pretrain("--load", "renamed", gradient_accumulation_steps=1)
    assert "from iteration 6" in text and "finished at iteration 8" in text
    assert checkpoint.samples_of_run(None, 8, 2) == 16


def test_a_diverged_run_goes_on_further_back_and_its_remedies_work(pretrain: Program, tmp_path: Path) -> None:
    start = ("--save", "run", "--auto-resume", "--save-interval", "1")
    pretrain(*start, "--exit-interval", "4")
    # From step 5 on with a learning rate that leaves finite, useless weights.
    text = pretrain(*start, expect=2, optimizer__params__lr=1e18, gradient_clipping=None)
    assert "optimizer.params.lr = 1e+18 (was 0.01)" in text
    assert re.search(r"iteration 6: loss is (nan|inf).*[Ll]ower the learning rate or set gradient_clipping", text, re.S)
    assert "run/global_step5 does not train: the next --auto-resume goes further back" in text
    assert failure_notes.read(tmp_path / "run/global_step5") is not None
    assert failure_notes.read(tmp_path / "run/global_step4") is None, "only what the run came from"
    explicit = pretrain("--load", "run/global_step5", "--save", "run", expect=2)
    assert "from iteration 5" in explicit, "a user who names it gets it"
    assert "--load run/global_step5: a run that went on from it ended at once (iteration 6: " in explicit
    text = pretrain(*start, optimizer__params__lr=1e-5)
    assert (
        "passed over: --auto-resume run/global_step5: a run that went on from it ended at once (iteration 6: " in text
    )
    assert "from iteration 4" in text and "finished at iteration 8" in text
    assert "lr 1e-05" in text, "the lower learning rate has an effect"
    assert failure_notes.read(tmp_path / "run/global_step5") is None, "the new checkpoint of that name is another one"


def test_when_no_checkpoint_trains_the_run_starts_again(pretrain: Program) -> None:
    bad = {"optimizer__params__lr": 1e18, "gradient_clipping": None}
    start = ("--save", "run", "--auto-resume", "--save-interval", "1", "--keep-last", "1")
    pretrain(*start, expect=2, **bad)
    text = pretrain(*start, optimizer__params__lr=1e-3)
    assert "passed over" in text and "this run starts from scratch" in text and "finished at iteration 8" in text


def test_a_failure_far_behind_a_checkpoint_is_not_its_own(tmp_path: Path) -> None:
    for number in (10, 20):
        (tmp_path / f"global_step{number}").mkdir()
    assert failure_notes.note(tmp_path, 20 + failure_notes.FIRST_STEPS + 1, "loss is nan") is None
    assert failure_notes.note(tmp_path, 10, "loss is nan") is None, "what is newer is not where it came from"
    assert failure_notes.note(tmp_path, 21, "loss is nan") == tmp_path / "global_step20"
    assert (
        failure_notes.read(tmp_path / "global_step20") == "loss is nan"
        and failure_notes.read(tmp_path / "global_step10") is None
    )


def test_the_image_program_does_likewise(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    flags = [
        "--preset",
        "swin-digits",
        "--dataset",
        "digits",
        "--train-iters",
        "1",
        "--deepspeed_config",
        str(ROOT / "ds_configs/swin_digits_cpu.json"),
    ]
    flags += ["--moe-expert-parallel-size", "1"]
    assert pretrain_swin_program.main([*flags, "--load", str(tmp_path / "absent")]) == 2
    assert "(no such directory); correct the path" in capfd.readouterr().err
    (tmp_path / "run/global_step5").mkdir(parents=True)
    assert pretrain_swin_program.main([*flags, "--save", str(tmp_path / "run")]) == 2
    assert "holds checkpoints of another run (global_step5)" in capfd.readouterr().err


# --- remedies of other messages


def test_a_damaged_checkpoints_remedies_work(pretrain: Program, tmp_path: Path) -> None:
    pretrain("--save", "run", "--save-interval", "1", "--exit-interval", "2")
    (tmp_path / "run/global_step2/mp_rank_00_model_states.pt").write_bytes(b"")
    text = pretrain("--load", "run", "--save", "other", expect=2)
    remedy = "Name an earlier one: --load run/global_step1, or go on with --save run --auto-resume, which looks for one"
    assert remedy in text
    assert "from iteration 1" in pretrain("--load", "run/global_step1", "--save", "other", "--exit-interval", "2")
    assert "from iteration 1" in pretrain("--save", "run", "--auto-resume", "--exit-interval", "2")
    shutil.rmtree(tmp_path / "run/global_step1")
    (tmp_path / "run/global_step2/mp_rank_00_model_states.pt").write_bytes(b"")
    assert "There is no earlier one beside it" in pretrain("--load", "run", expect=2)


def test_a_full_disks_remedy_works(pretrain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain("--save", "run", "--exit-interval", "1")
    from scmoe_ds.checkpoint import rotation

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rotation, "publish", full)
        text = pretrain("--save", "run", "--auto-resume", "--exit-interval", "2", expect=2)
    assert "whole: make room there, or go on elsewhere with --load run --save ANOTHER" in text
    text = pretrain("--load", "run", "--save", "ANOTHER", "--exit-interval", "2")
    assert "from iteration 1" in text and pretrain.steps("ANOTHER") == [2]


def test_a_layout_that_binds_goes_on_in_that_very_layout(pretrain: Program) -> None:
    flat = {"zero_optimization__stage": 0}
    pretrain("--save", "run", "--exit-interval", "1", **flat)
    text = pretrain("--load", "run", "--exit-interval", "2", expect=2)
    assert "zero_optimization.stage = 0 binds a checkpoint to its layout; resume with the very layout" in text
    text = pretrain("--load", "run", "--exit-interval", "2", **flat, optimizer__params__lr=1e-6)
    assert "from iteration 1" in text and "learning rate of the next step: 1e-06; by the checkpoint's" in text


def test_tools_and_files_that_messages_name_exist() -> None:
    for source in [*ROOT.glob("scmoe_ds/**/*.py"), *ROOT.glob("*.py")]:
        for named in re.findall(r"\b(?:docs|ds_configs|examples)/\w+(?:\.\w+)+\b", source.read_text()):
            assert (ROOT / named).is_file(), f"{source.name} names {named}"
