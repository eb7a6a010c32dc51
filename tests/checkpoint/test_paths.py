"""Directories of any name: the checkpoint that was checked is the one that is loaded. Whole programs, one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from scmoe_ds.checkpoint.export import open_weights
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program
from tests.checkpoint.test_damaged import Payload
from tests.programs.test_bad_input import FLAGS, JSON
from tests.programs.test_bad_input import data as data
from tests.programs.test_bad_input import world_of_one as world_of_one


def pretrain(directory: Path, data: str, *flags: str, **changes: Any) -> int:
    file = directory / "ds.json"
    file.write_text(json.dumps({**JSON, "tensorboard": {"enabled": False}, **changes}))
    base = [word for pair in FLAGS.items() for word in pair]
    return pretrain_gpt_program.main([*base, "--deepspeed_config", str(file), "--data-path", data, *flags])


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights, _ = open_weights(directory)
    return {name: weights.read(name) for name in weights.names()}


def test_a_directory_whose_name_is_a_pattern(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed looks for a checkpoint's files by a pattern; the decoy is what it would find."""
    monkeypatch.chdir(tmp_path)
    saved, decoy, whole = (
        str(tmp_path / name) for name in ("a[1]?*/-run [12]\n\u00fc", "a12 /-run 1\n\u00fc", "never stopped")
    )
    (tmp_path / "a[1]?*").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a[1]?*")
    assert pretrain(tmp_path, data, "--save", decoy, "--train-iters", "3", "--exit-interval", "2", "--seed", "1") == 0
    assert pretrain(tmp_path, data, "--save", saved, "--train-iters", "3", "--exit-interval", "2", "--seed", "2") == 0
    assert pretrain(tmp_path, data, "--save", whole, "--train-iters", "3", "--seed", "2") == 0
    relative = str(Path("link", Path(saved).name)) + "/"
    assert pretrain(tmp_path, data, "--save", relative, "--auto-resume", "--train-iters", "3", "--seed", "2") == 0
    assert "from iteration 2 to 3" in capfd.readouterr().out
    expected, found = weights_of(Path(whole)), weights_of(Path(saved))
    assert all(torch.equal(expected[name], found[name]) for name in expected.keys() | found.keys())


def test_a_name_that_cannot_be_printed(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    assert pretrain(tmp_path, data, "--save", str(tmp_path / os.fsdecode(b"\xff"))) == 2
    error = capfd.readouterr().err
    assert "--save " in error and "is not UTF-8; choose another name" in error and "Traceback" not in error


def test_deepspeeds_own_loader_runs_no_code(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a file that changed after it was checked."""
    save = str(tmp_path / "saved")
    assert pretrain(tmp_path, data, "--save", save, "--train-iters", "2", "--exit-interval", "1") == 0
    build, file = pretrain_gpt_program.build_model, next(Path(save).glob("*/layer_0_expert_2_*.pt"))

    def build_later(*arguments: Any) -> Any:
        torch.save({"payload": Payload(tmp_path / "ran")}, file)
        return build(*arguments)

    monkeypatch.setattr(pretrain_gpt_program, "build_model", build_later)
    assert pretrain(tmp_path, data, "--load", save, "--train-iters", "2") == 2
    assert f"{file.name} holds posix.system, which is no part of a checkpoint" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_checkpoints_without_zip_files_go_on(tmp_path: Path, data: str, capfd: pytest.CaptureFixture) -> None:
    legacy = {"checkpoint": {"checkpoint_serialization": False}}
    save = str(tmp_path / "saved")
    assert pretrain(tmp_path, data, "--save", save, "--train-iters", "2", "--exit-interval", "1", **legacy) == 0
    assert pretrain(tmp_path, data, "--save", save, "--auto-resume", "--train-iters", "2") == 0
    assert "from iteration 1 to 2" in capfd.readouterr().out
    assert weights_of(Path(save))
