"""The learning rate that is reported is the one that the step was made with; warm-up schedules that begin with 0."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.engine import DeepSpeedEngine

from lab.training_log import steps
from scmoe_ds.config.deepspeed_settings import steps_without_rate, warn
from scmoe_ds.programs import pretrain_gpt as pretrain_gpt_program
from tests.programs.test_bad_input import FLAGS, JSON
from tests.programs.test_bad_input import data as data
from tests.programs.test_bad_input import world_of_one as world_of_one

COSINE = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": "auto", "warmup_num_steps": 3, "cos_min_ratio": 0.1, "warmup_type": "linear"},
}


def test_log_and_monitors_show_the_steps_own_rate(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, take_step = [], DeepSpeedEngine._take_model_step

    def note(engine: Any, *args: Any) -> None:
        used.append(engine.optimizer.param_groups[0]["lr"])
        take_step(engine, *args)

    monkeypatch.setattr(DeepSpeedEngine, "_take_model_step", note)
    monitor = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    whole = {
        **JSON,
        "scheduler": COSINE,
        "csv_monitor": monitor,
        "tensorboard": {"enabled": False},
        "steps_per_print": 1,
    }
    (tmp_path / "ds.json").write_text(json.dumps(whole))
    flags = [word for pair in FLAGS.items() for word in pair]
    assert (
        pretrain_gpt_program.main(
            [
                *flags,
                "--deepspeed_config",
                str(tmp_path / "ds.json"),
                "--data-path",
                data,
                "--train-iters",
                "6",
                "--log-interval",
                "1",
            ]
        )
        == 0
    )
    output = capfd.readouterr()
    logged = [float(values["lr"]) for values in steps(output.out).values()]
    assert len(used) == 6 and used[:2] == [0, 0] and max(used) > used[-1] > 0
    assert logged == pytest.approx(used, rel=1e-3)
    (file,) = (tmp_path / "csv").rglob("Train_Samples_lr.csv")
    written = [float(row[1]) for row in list(csv.reader(file.open()))[1:]]
    assert written == pytest.approx(used)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        (kind, {**params, **least})
        for kind, params, key in (
            ("WarmupLR", {"warmup_max_lr": 0.1}, "warmup_min_lr"),
            ("WarmupDecayLR", {"warmup_max_lr": 0.1, "total_num_steps": 20}, "warmup_min_lr"),
            ("WarmupCosineLR", {"total_num_steps": 20}, "warmup_min_ratio"),
        )
        for least in ({}, {key: 0.01}, {"warmup_type": "linear"})
    ]
    + [("OneCycle", {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1})],
)
def test_steps_without_a_rate_are_counted_as_deepspeed_makes_them(
    kind: str, params: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    warm_up = {"warmup_num_steps": 5} if kind.startswith("Warmup") else {"cycle_momentum": False}
    scheduler, rates = getattr(lr_schedules, kind)(optimizer, **params, **warm_up), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    schedule = {"type": kind, "params": params}
    assert steps_without_rate(schedule) == rates.count(0) and 0 not in rates[rates.count(0) :]
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        warn({"scheduler": schedule})
    assert ("a learning rate of 0" in caplog.text) == (0 in rates)
