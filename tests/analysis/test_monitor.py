"""Gates watched while a model trains: what is written against `measure` with the weights of that step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.analysis.gating import SCALARS, measure
from scmoe_ds.analysis.gating_monitor import GatingMonitor
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from tests.analysis.test_gating import SETTINGS, section, serving, tokens_of

Event = tuple[str, float, int]


def start(path: Path, steps: int, **fields: Any) -> tuple[Any, GPT, list[Event]]:
    """An engine, its model, and what will be written."""
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "csv_monitor": {"enabled": True, "output_path": str(path), "job_name": "job"},
        "scmoe": {
            "num_experts": 4,
            "capacity_factor": 0.75,
            "min_capacity": 1,
            "overlap": {"calibration_steps": 0},
            **fields,
        },
    }
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, 3, 0.5, 4)
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    events: list[Event] = []
    write = engine.monitor.write_events
    engine.monitor.write_events = lambda found: (events.extend(found), write(found))
    return engine, model, events


def train(engine: Any, number: int) -> None:
    """One micro-batch."""
    batch = tokens_of(number)
    engine.backward(engine(batch, labels=batch.roll(-1, 1)).loss)
    engine.step()


@pytest.mark.parametrize("architecture", ["scmoe", "topk"])
def test_monitor(architecture: str, tmp_path: Path) -> None:
    """Two micro-batches a step, every second step."""
    connect()
    engine, model, events = start(tmp_path, 2, architecture=architecture)
    monitor, trained = GatingMonitor(engine, 2), section(architecture=architecture)
    expected: list[dict[str, Any]] = []
    for step in range(4):
        if step % 2:
            copy = serving(trained)
            copy.load_state_dict(model.state_dict())
            # Training drops tokens, which changes what later layers read: only the first one is the same without.
            expected.append(
                measure(copy, trained, copy.hidden_states, [tokens_of(2 * step), tokens_of(2 * step + 1)])[0]
            )
        for micro_step in range(2):
            train(engine, 2 * step + micro_step)
    found = [event for event in events if event[0].startswith("Gating/")]
    assert len(found) == 2 * 2 * len(SCALARS)  # steps, layers
    for number, samples in enumerate((8, 16)):
        values = {name: value for name, value, at in found if at == samples}
        for name in SCALARS:
            assert values[f"Gating/block_1/{name}"] == pytest.approx(expected[number][name], abs=1e-5), name
            assert math.isfinite(values[f"Gating/block_3/{name}"])
    assert list(tmp_path.rglob("*Gating_block_1_l2*"))
    hooks = len(model._forward_hooks) + len(model._forward_pre_hooks)
    monitor.detach()
    assert len(model._forward_hooks) + len(model._forward_pre_hooks) == hooks - 2


def one_step(path: Path) -> list[Event]:
    """What a rank of two writes; each reads tokens of its own."""
    engine, _, events = start(path, 1, expert_parallel_size=2)
    GatingMonitor(engine, 1)
    train(engine, dist.get_rank())
    return [event for event in events if event[0].startswith("Gating/")]


def test_two_ranks(tmp_path: Path) -> None:
    """Expert-parallel ranks together write what one process finds on the tokens of both, once."""
    first, second = run_distributed(one_step, 2, tmp_path)
    connect()
    trained = section()
    model = serving(trained)
    expected = measure(model, trained, model.hidden_states, [tokens_of(0), tokens_of(1)])[0]
    assert not second and len(first) == 2 * len(SCALARS)
    values = {name: value for name, value, samples in first if samples == 4}
    for name in SCALARS:
        assert values[f"Gating/block_1/{name}"] == pytest.approx(expected[name], abs=1e-6), name
