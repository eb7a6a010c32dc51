"""Offloaded experts under expert parallelism and ZeRO-1: each rank moves its own, and the numbers are the same."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from tests.engine.test_offloaded import BF16, SETTINGS, make_engine, make_json, train

STEPS, SAVED = 20, 4


def on_two_ranks(directory: str) -> dict[str, Any]:
    def whole(offload: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
        found = make_json(offload, **changes)
        found["scmoe"] |= {"expert_parallel_size": 2, "all_to_all": "collective"}
        return found

    found: dict[str, Any] = {}
    for name, changes in (("fp32", {}), ("bf16", BF16)):
        found[name] = train(make_engine(whole(None, **changes)), STEPS)
        found[f"{name} host"] = train(make_engine(whole({"device": "cpu"}, **changes)), STEPS)
    away = whole({"device": "nvme", "nvme_path": directory, "buffer_count": 2})
    engine = make_engine(away)
    first = train(engine, SAVED)
    describe = [
        checkpoint.describe(SETTINGS, ScMoEConfig.from_deepspeed(each), 2, each) for each in (away, whole(None))
    ]
    saved = checkpoint.save(engine, f"{directory}/run", SAVED, 16, describe[0])
    resumed = make_engine(whole(None))
    checkpoint.load(resumed, checkpoint.choose(str(saved), None, False, describe[1]))
    found["saved by ranks"] = first + train(resumed, STEPS - SAVED, SAVED)
    with pytest.raises(ScMoEConfigError, match=r"expert_parallel_size = 1: beside .* it must be the world size 2"):
        make_engine(make_json({"device": "cpu"}))
    return found


def test_two_ranks_have_the_losses_of_experts_in_memory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for found in run_distributed(on_two_ranks, 2, directory):
            assert found["fp32"] == found["fp32 host"] == found["saved by ranks"]
            assert found["bf16"] == found["bf16 host"] != found["fp32"]
