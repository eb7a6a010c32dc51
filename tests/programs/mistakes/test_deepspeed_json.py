"""The DeepSpeed JSON: files that are none, and what DeepSpeed itself finds when it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime import lr_schedules
from torch import nn

import scmoe_ds
from scmoe_ds.errors import ScMoEConfigError
from tests.programs.mistakes.workplace import DATA, JSON, TRAIN, expect, write_json

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"bad\.json: not valid JSON \(Expecting value: line 1"),
    "comment": (b'{"a": 1, // mine\n "b": 2}', r"bad\.json: not valid JSON .*line 1 column 10.*comments and trailing"),
    "trailing comma": (b'{"a": 1,}', r"bad\.json: not valid JSON .*trailing commas are not allowed"),
    "YAML": (b"train_batch_size: 2\nscmoe:\n  top_k: 1\n", r"bad\.json: not valid JSON"),
    "Python": (b"{'train_batch_size': 2}", r"bad\.json: not valid JSON .*double quotes"),
    "UTF-16": (json.dumps(JSON).encode("utf-16"), r"bad\.json: not valid JSON .*can't decode"),
    "a list": (b"[1]", r"bad\.json: the DeepSpeed JSON must be an object, not list"),
    "cut": (json.dumps(JSON).encode()[:-9], r"bad\.json: not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_json(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[case]
    Path("bad.json").write_bytes(content)
    expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", message, capfd)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"nothing: cannot read the DeepSpeed JSON \(Is a directory\)"),
        ("absent.json", r"absent\.json: cannot read the DeepSpeed JSON \(No such file or directory\)"),
        ("''", r"--deepspeed_config: its value is empty"),
    ],
)
def test_a_path_that_is_no_file(path: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    expect(f"{TRAIN} {DATA} --deepspeed_config {path}", message, capfd)


def test_a_byte_order_mark_is_no_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({**JSON, "scmoe": {"top_k": 9}}).encode())
    expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", r"scmoe\.top_k = 9: cannot exceed", capfd)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no optimizer": ({"optimizer": None}, r"optimizer is missing: training needs one; add"),
    "no optimizer or ZeRO": (
        {"optimizer": None, "zero_optimization.stage": 0},
        r"optimizer is missing: training needs one",
    ),
    "another schedule's parameter": (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 9}}},
        r"scheduler\.params\.total_num_steps: unknown key",
    ),
    "learning rate as text": ({"optimizer.params.lr": "1e-3"}, r'optimizer\.params\.lr = "1e-3": is a string'),
    "negative learning rate": ({"optimizer.params.lr": -1}, r"optimizer\.params\.lr = -1: Invalid learning rate"),
    "auto": ({"gradient_accumulation_steps": "auto"}, r'gradient_accumulation_steps = "auto": is filled in by Hugging'),
    "a device that is none": (
        {"zero_optimization.offload_optimizer": {"device": "gpu"}},
        r'zero_optimization\.offload_optimizer\.device = "gpu": must be',
    ),
    "misspelt at the top": (
        {"gradient_cliping": 1},
        r'gradient_cliping: unknown key \(did you mean "gradient_clipping',
    ),
    "misspelt inside": ({"zero_optimization.stge": 2}, r'zero_optimization\.stge: unknown key \(did you mean "stage"'),
    "a key of the section beside it": ({"num_experts": 4}, r'num_experts: .*did you mean "scmoe": \{"num_experts"\}'),
    "a key of ZeRO beside it": (
        {"overlap_comm": True},
        r'overlap_comm: unknown key \(did you mean "zero_optimization": \{"overlap_comm"\}',
    ),
    "a key that pydantic refuses": ({"scmoe.min_capacity": -1}, r"scmoe\.min_capacity = -1: must be greater than or"),
    "batches that do not fit": (
        {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 4},
        r"train_batch_size = 2: must equal train_micro_batch_size_per_gpu \(4\) \* gradient_accumulation_steps \(1\)",
    ),
    "optimizer as text": ({"optimizer": "AdamW"}, r'optimizer = "AdamW": must be an object'),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    changes, message = SETTINGS[case]
    write_json("bad.json", changes)
    expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", message, capfd)


def raises(error: Exception) -> Any:
    def stand_in(*args: object, **kwargs: object) -> None:
        raise error

    return stand_in


@pytest.mark.parametrize("monitor", ["wandb", "comet"])
def test_a_service_that_refuses(
    monitor: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its package is installed, but its user has not logged in."""
    package = ModuleType({"comet": "comet_ml"}.get(monitor, monitor))
    package.__spec__ = object()  # type: ignore[assignment]
    package.__version__ = "99.0"  # type: ignore[attr-defined]
    package.init = package.start = raises(RuntimeError("api_key not configured (no-tty)."))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    write_json("bad.json", {monitor: {"enabled": True, "project": "p"}})
    message = rf'{monitor} = {{"enabled": true, .*}}: DeepSpeed stops at it \(RuntimeError: api_key not configured'
    expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", message, capfd)


def test_a_package_that_is_broken(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write_json("bad.json", {"tensorboard": {"enabled": True, "output_path": "board"}})
    message = r"tensorboard = .*: DeepSpeed stops at it \(ModuleNotFoundError: .*torch\.utils\.tensorboard"
    expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", message, capfd)


STOPS: dict[str, tuple[Any, str, str]] = {
    "optimizer": (torch.optim.AdamW, "__init__", "optimizer"),
    "schedule": (lr_schedules.WarmupLR, "__init__", "scheduler"),
    "ZeRO": (deepspeed_engine.DeepSpeedZeroOptimizer, "__init__", "zero_optimization"),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_rule_of_deepspeed_that_nobody_knows(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    holder, attribute, section = STOPS[case]
    write_json("bad.json", {"scheduler": {"type": "WarmupLR", "params": {}}})
    with monkeypatch.context() as patch:
        initialize = deepspeed.initialize

        def later(*args: Any, **kwargs: Any) -> Any:
            patch.setattr(holder, attribute, raises(AssertionError("no such thing here\nwith more lines")))
            return initialize(*args, **kwargs)

        patch.setattr(deepspeed, "initialize", later)
        message = rf"{section} = .*: DeepSpeed stops at it \(AssertionError: no such thing here\); correct it"
        expect(f"{TRAIN} {DATA} --deepspeed_config bad.json", message, capfd)


def test_errors_of_the_users_own_objects_stay_as_they_are() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = scmoe_ds.ScMoE(8, nn.Linear(8, 8), num_experts=4)

    with pytest.raises(ZeroDivisionError):
        scmoe_ds.initialize(model=Model(), config=JSON, optimizer=lambda groups: 1 // 0)
    for name in ("optimizer", "lr_scheduler"):
        with pytest.raises(ScMoEConfigError, match=f"^{name} = 'AdamW': must be an object of torch or a function"):
            scmoe_ds.initialize(model=Model(), config=JSON, **{name: "AdamW"})
