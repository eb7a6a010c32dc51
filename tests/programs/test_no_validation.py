"""Runs without validation data, or without training: what the flags leave out is left out, and said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scmoe_ds.data.indexed_writer import write_indexed_dataset
from scmoe_ds.engine import connect
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program
from scmoe_ds.programs import pretrain_swin as pretrain_swin_program
from tests.programs.test_bad_input import FLAGS, JSON

ROOT = Path(__file__).parents[2]
SWIN = (
    "--dataset digits --img-size 16 --patch-dim 1 --window-size 4 --embed-dim 8 --depths 1 1 2 2 --num-heads 1 1 2 2 "
    "--num-channels 1 --num-classes 10 --train-iters 1"
).split()


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def gpt(directory: Path, **changes: str | None) -> int:
    """The exit code of a run whose flags are changed, or left out with None."""
    prefix = write_indexed_dataset(str(directory / "data"), [[k] * 300 for k in range(20)], 257).prefix
    (directory / "ds.json").write_text(json.dumps({**JSON, "tensorboard": {"enabled": False}}))
    flags = {**FLAGS, "--deepspeed_config": str(directory / "ds.json"), "--data-path": prefix}
    flags.update({f"--{name.replace('_', '-')}": value for name, value in changes.items()})
    return pretrain_gpt_program.main(
        [word for name, value in flags.items() if value is not None for word in (name, value)]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "100,0,0"}, "--split 100,0,0 leaves no share for it"),
        ({"split": "1"}, "--split 1 leaves no share for it"),
        ({"split": "90,0,10"}, "--split 90,0,10 leaves no share for it"),
        ({"eval_iters": "0"}, "--eval-iters 0"),
        ({"eval_iters": "0", "split": "99,1"}, "--eval-iters 0"),  # 1 % of 20 documents is none
    ],
)
def test_training_without_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, str], reason: str
) -> None:
    assert gpt(tmp_path, **changes) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation" in line or "entropy" in line]
    assert lines == [f"no validation: {reason}"]


def test_validation_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpt(tmp_path, train_iters="0", split="0,1") == 0
    assert "validation loss" in capsys.readouterr().out
    assert gpt(tmp_path, train_iters="1", split="0,1") == 2
    assert "the train split (--split 0,1) is 0 of 20 documents" in capsys.readouterr().err


def test_a_share_that_rounds_to_nothing_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way out is a case above."""
    assert gpt(tmp_path, split="99,1") == 2
    assert "or --eval-iters 0 for a run without validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(["--split", "100,0"], "--split 100,0 leaves no share for it"), (["--eval-iters", "0"], "--eval-iters 0")],
)
def test_images_without_validation(capsys: pytest.CaptureFixture[str], flags: list[str], reason: str) -> None:
    config = str(ROOT / "ds_configs" / "swin_digits_cpu.json")
    assert pretrain_swin_program.main([*SWIN, "--deepspeed_config", config, *flags]) == 0
    output = capsys.readouterr().out
    assert f"no validation: {reason}\n" in output
    assert "accuracy" not in output
