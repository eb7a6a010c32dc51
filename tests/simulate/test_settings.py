"""A DeepSpeed JSON as method and layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.errors import PlanError
from scmoe_ds.simulate.method import AUTOEP
from scmoe_ds.simulate.settings import read_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*_8xA*.json")), ids=lambda path: path.stem)
def test_shipped_settings_are_read(path: Path) -> None:
    whole = json.loads(path.read_text("utf-8"))
    settings, section = read_settings(path, 8), whole["scmoe"]
    layout = settings.layout
    assert layout.micro_batch * layout.accumulation * 8 == whole["train_batch_size"]
    assert layout.expert_parallel == section["expert_parallel_size"] and layout.precision == "bf16"
    assert layout.zero_stage == whole["zero_optimization"]["stage"]
    assert settings.method is not None and settings.method.capacity_factor == section.get("capacity_factor", 2.0)


def test_settings_that_contradict_each_other_end_in_one_sentence() -> None:
    bad: dict[str, dict[str, Any]] = {
        "must equal train_micro_batch_size_per_gpu (2)": {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 2},
        "scmoe.expert_parallel_size = 3: must divide the world size 8": {"scmoe": {"expert_parallel_size": 3}},
        "zero_optimization.stage = 5": {"zero_optimization": {"stage": 5}},
        'did you mean "scmoe"': {"scmoe": {"architecture": "scmo"}},
        "scmoe.capacity_factor = -1": {"scmoe": {"capacity_factor": -1}},
        'expert_tensor_parallelism = "partition": is not simulated by this name': {
            "scmoe": {"expert_tensor_parallelism": "partition"}
        },
        'scmoe.top_k = "2"': {"scmoe": {"top_k": "2"}},
        "its two gates are not simulated": {"scmoe": {"architecture": "dgmoe"}},
        "is not simulated; remove it": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        "scmoe = 3: must be a JSON object": {"scmoe": 3},
        "zero_optimization = 3: must be a JSON object": {"zero_optimization": 3},
    }
    for says, whole in bad.items():
        with pytest.raises(PlanError) as found:
            read_settings(whole, 8)
        assert says in str(found.value) and "\n" not in str(found.value)
    assert read_settings({}, 8).method is None
    converted = {"expert_parallel": {"enabled": True}, "scmoe": {"architecture": "scmoe"}}
    method = read_settings(converted, 8).method
    assert method is not None and (method.position, method.adds_shared, method.merge) == ("pos1", False, "add")
    assert read_settings({"expert_parallel": {"enabled": True, "autoep_size": 4}}, 8).method == AUTOEP
