"""Offloaded experts under expert parallelism, expert data parallelism and ZeRO: the numbers of experts in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds import checkpoint
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.offload.trainable import offloaded
from tests.engine.test_offloaded import BF16, SETTINGS, make_engine, make_json, train, train_over_nan

STEPS, SAVED = 6, 3
ZERO_2 = {"zero_optimization": {"stage": 2}}


def make(
    experts: int, ep: int, offload: dict[str, Any] | None, accumulation: int = 2, **changes: Any
) -> dict[str, Any]:
    found = make_json(offload, accumulation, **changes)
    found["scmoe"] |= {"num_experts": experts, "expert_parallel_size": ep, "all_to_all": "collective"}
    return found


def trained(engine: Any, steps: int, start: int = 0) -> list[float]:
    return train(engine, steps, start, dist.get_rank())


def on_two_ranks(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, changes in (("fp32", {}), ("bf16", BF16), ("ZeRO-2", ZERO_2)):
        found[name] = trained(make_engine(make(6, 2, None, **changes)), STEPS)
        found[f"{name} host"] = trained(make_engine(make(6, 2, {"device": "cpu"}, **changes)), STEPS)
    away = make(6, 2, {"device": "nvme", "nvme_path": directory, "buffer_count": 2})
    engine = make_engine(away)
    first = trained(engine, SAVED)
    saved = save(engine, away, 2, directory)
    found["saved by ranks"] = first + trained(resumed(make(6, 2, None), 2, saved), STEPS - SAVED, SAVED)
    return found


def save(engine: Any, whole: dict[str, Any], ranks: int, directory: str) -> Path:
    description = checkpoint.describe(SETTINGS, ScMoEConfig.from_deepspeed(whole), ranks, whole)
    return checkpoint.save(engine, f"{directory}/run", SAVED, SAVED * 4 * ranks, description)


def resumed(whole: dict[str, Any], ranks: int, saved: Path) -> Any:
    engine = make_engine(whole)
    description = checkpoint.describe(SETTINGS, ScMoEConfig.from_deepspeed(whole), ranks, whole)
    checkpoint.load(engine, checkpoint.choose(str(saved), None, False, description))
    return engine


def test_two_ranks_have_the_losses_of_experts_in_memory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for found in run_distributed(on_two_ranks, 2, directory):
            assert found["fp32"] == found["fp32 host"] == found["saved by ranks"]
            assert found["bf16"] == found["bf16 host"] != found["fp32"]
            assert found["ZeRO-2"] == found["ZeRO-2 host"]


def on_four_ranks(directory: str) -> dict[str, Any]:
    """Each expert is on two of them. The first engines start with other weights on each rank: those of one rank hold."""
    host, disk = {"device": "cpu", "buffer_count": 3}, {"device": "nvme", "nvme_path": directory, "buffer_count": 2}
    found: dict[str, Any] = {}
    for name, offload in (("memory", None), ("elsewhere", host)):
        engine = make_engine(make(4, 2, offload, 1, **BF16), seed=dist.get_rank())
        found[f"bf16 start {name}"] = {key: value.sum().item() for key, value in engine.module.state_dict().items()}
        found[f"bf16 {name}"] = trained(engine, 4)
        engine = make_engine(make(4, 2, offload, 1, **ZERO_2))
        found[f"ZeRO-2 {name}"] = train_over_nan(engine, dist.get_rank())
    runs = {"memory": make(4, 2, None), "elsewhere": make(4, 2, disk)}
    for name, whole in runs.items():
        engine = make_engine(whole)
        found[name] = trained(engine, SAVED)
        saved = save(engine, whole, 4, f"{directory}/{name}")
        found[f"saved in {name}"] = saved
        scmoe_ds.save_pretrained(engine, f"{directory}/whole {name}")
        found[name] += trained(engine, STEPS - SAVED, SAVED)
        if name == "elsewhere":
            with pytest.raises(CheckpointError, match=r"state_dict: after a step .* next forward pass"):
                engine.module.state_dict()
        for experts in offloaded(engine.module)[:1]:
            found["shares"] = list(map(len, dist_gather(list(experts.states.kept))))
    for then, now in (("memory", "elsewhere"), ("elsewhere", "memory")):
        engine = resumed(runs[now], 4, found[f"saved in {then}"])
        found[f"from {then}"] = trained(engine, STEPS - SAVED, SAVED)
    for name, offload in (("memory", None), ("elsewhere", host)):  # every rank alone has its experts
        engine = resumed(make(4, 4, offload), 4, found[f"saved in {name}"])
        found[f"{name}, divided anew"] = trained(engine, 2, SAVED)
    return found


def weights_of(directory: str) -> dict[str, Any]:
    return {name: each for file in Path(directory).glob("*.safetensors") for name, each in load_file(file).items()}


def dist_gather(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def test_four_ranks_have_the_losses_of_experts_in_memory() -> None:
    with tempfile.TemporaryDirectory() as directory:
        results = run_distributed(on_four_ranks, 4, directory)
        whole, other = (weights_of(f"{directory}/whole {name}") for name in ("memory", "elsewhere"))
        assert whole.keys() == other.keys() and all(torch.equal(other[name], each) for name, each in whole.items())
        for found in results:
            assert found["memory"] == found["elsewhere"]
            for kind in ("bf16 start", "bf16", "ZeRO-2"):
                assert found[f"{kind} memory"] == found[f"{kind} elsewhere"]
            assert found["shares"] == [2] * 4
            for then in ("memory", "elsewhere"):
                assert found[f"from {then}"] == found["memory"][-len(found[f"from {then}"]) :]
            assert found["memory, divided anew"] == found["elsewhere, divided anew"]
