"""Plain DeepSpeed, given a JSON with a "scmoe" section, warns; `scmoe_ds.initialize` does not."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import scmoe_ds
from scmoe_ds.config.unread_section import watch_engines
from scmoe_ds.engine import connect

WHOLE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "scmoe": {"overlap": {"calibration_steps": 0}}}
WORDS = 'the "scmoe" section of the DeepSpeed JSON does nothing'


def with_scmoe() -> nn.Module:
    return nn.Sequential(scmoe_ds.ScMoE(8, nn.Linear(8, 8), 4, min_capacity=1))


@pytest.mark.parametrize(
    "make, said",
    [(lambda: nn.Linear(8, 8), "Linear has no ScMoE layer and trains as it is"), (with_scmoe, "no schedule is timed")],
)
def test_plain_deepspeed_warns(make: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    connect()
    deepspeed.initialize(model=make(), config=WHOLE)
    assert WORDS in caplog.text and said in caplog.text


def test_nobody_is_warned_without_a_section_or_by_our_own_initialize(caplog: pytest.LogCaptureFixture) -> None:
    connect()
    engine, *_ = deepspeed.initialize(model=nn.Linear(8, 8), config={"train_micro_batch_size_per_gpu": 2})
    assert torch.isfinite(engine(torch.randn(2, 8))).all()
    scmoe_ds.initialize(model=with_scmoe(), config=WHOLE)
    assert WORDS not in caplog.text


def test_a_deepspeed_that_is_imported_later_is_watched_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in: the real one cannot be imported twice."""
    (tmp_path / "deepspeed/runtime").mkdir(parents=True)
    for name in ("__init__.py", "runtime/__init__.py"):
        (tmp_path / "deepspeed" / name).touch()
    text = "class DeepSpeedEngine:\n    def __init__(self, args, model, config=None):\n        self.model = model\n"
    (tmp_path / "deepspeed/runtime/engine.py").write_text(text)
    for name in [each for each in sys.modules if each.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    watch_engines()
    from deepspeed.runtime.engine import DeepSpeedEngine

    assert DeepSpeedEngine(None, "a model", config=WHOLE).model == "a model"
    assert caplog.text.count(WORDS) == 1
