"""Training with experts out of a GPU's memory: the CPU's bits, no race, and the host that computes waits for no copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.engine.offloaded import offload_experts, parameter_dtype
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.offload.records import HostRecords
from scmoe_ds.offload.room import sections
from scmoe_ds.offload.states import MASTER, ExpertStates
from scmoe_ds.offload.trainable import offloaded
from tests.engine.test_offloaded import BF16, SETTINGS, make_json
from tests.offload.test_states import KEY, OPTIONS, SHAPE
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu
from tests.simulated_gpu.gpu import Gpu
from tests.simulated_gpu.mutation import mutated
from tests.simulated_gpu.test_engine import ours

pytestmark = NEEDS_SIMULATION
TOKENS = torch.randint(64, (4, 2, 5), generator=torch.Generator().manual_seed(5))


def make(whole: dict[str, Any]) -> GPT:
    connect()
    model = GPT(SETTINGS, ScMoEConfig.from_deepspeed(whole))
    initialize_parameters(model, 1, 0.1, 4)
    return model


def train(model: GPT, whole: dict[str, Any], tokens: Tensor) -> tuple[Any, list[Tensor]]:
    engine, *_ = scmoe_ds.initialize(model=model, config=whole)
    losses = []
    for number, batch in enumerate(tokens):
        torch.manual_seed(number)
        loss = engine(batch[:, :-1], labels=batch[:, 1:]).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return engine, losses


def moved(model: GPT, whole: dict[str, Any], gpu: Gpu) -> GPT:
    settings = ScMoEConfig.from_deepspeed(whole).offload_experts
    assert settings is not None
    offload_experts(model, settings, parameter_dtype(whole), torch.device("cuda", 0))
    return gpu.move(model)


def on_a_gpu(whole: dict[str, Any]) -> tuple[list[float], list[str], dict[str, int]]:
    with simulated_gpu((8, 0)) as gpu:
        engine, losses = train(moved(make(whole), whole, gpu), whole, gpu.move(TOKENS))
        for experts in offloaded(engine.module)[:1]:
            experts.states.finish()
        waits = {wait: count for wait, count in gpu.host_waits.items() if "offload/" in wait and "shape.py" not in wait}
        return [float(gpu.peek(loss)) for loss in losses], ours(list(gpu.findings)), waits


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_a_gpu_trains_as_the_cpu(device: str, bf16: bool, tmp_path: Path) -> None:
    path = {"nvme_path": str(tmp_path)} if device == "nvme" else {}
    changes = BF16 if bf16 else {}
    away = make_json({"device": device, "buffer_count": 3, **path}, 2, **changes)
    _, expected = train(make(away), away, TOKENS)
    losses, findings, waits = on_a_gpu(away)
    assert losses == [float(loss) for loss in expected]
    assert not findings
    assert all("records.py" in wait for wait in waits) and bool(waits) == (device == "nvme"), waits


FAULTS = [
    ("scmoe_ds.offload.states", "self._behind(ready)", "pass"),
    ("scmoe_ds.offload.turns", "self._behind(copied)", "pass"),
    ("scmoe_ds.offload.workers", "torch.cuda.current_stream().wait_event(event)", "pass"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_keeps_the_order_is_needed(fault: tuple[str, str, str]) -> None:
    with mutated(*fault):
        assert any("race" in each for each in on_a_gpu(make_json({"device": "cpu", "buffer_count": 2}, 2))[1])


def findings_of_a_step() -> list[str]:
    """Of one expert, whose clipping factor nobody else keeps."""
    with simulated_gpu((8, 0)) as gpu:
        device = torch.device("cuda", 0)
        records = HostRecords([sections(SHAPE, torch.float32)], device)
        states = ExpertStates([KEY], SHAPE, torch.float32, device, records)
        states.write(KEY, {"weight": {MASTER: torch.ones(2, 3)}})
        states.keep(KEY, states.gradient_buffer().fill_(1))
        states.step(torch.ones(1, device=device), torch.optim.Adam, OPTIONS)
        states.finish()
        return list(gpu.findings)


def test_the_clipping_factor_is_kept_until_it_is_read() -> None:
    assert not findings_of_a_step()
    with mutated(
        "scmoe_ds.offload.states", "step.factor.record_stream(torch.cuda.current_stream(self.device))", "pass"
    ):
        assert any("use after free" in each for each in findings_of_a_step())


FAULTS_OF_TWO = [
    ("self._behind(filled.result())", "filled.result()"),
    ("work.wait()\n                pieces", "pieces"),
    ("work.wait()\n                if not", "if not"),
]


def on_two_gpus() -> list[Any]:
    """They have the same experts. In fp32 and bf16, then with faults."""
    found: list[Any] = []
    for changes in ({}, BF16):
        away = make_json({"device": "cpu", "buffer_count": 3}, 1, **changes)
        _, expected = train(make(away), away, TOKENS)
        losses, findings, waits = on_a_gpu(away)
        found.append((losses == [float(loss) for loss in expected], findings, waits))
    for old, new in FAULTS_OF_TWO:
        with mutated("scmoe_ds.offload.shared", old, new):
            findings = on_a_gpu(make_json({"device": "cpu", "buffer_count": 2}, 1))[1]
            found.append(any("race" in each for each in findings))
    return found


def test_two_gpus_with_the_same_experts() -> None:
    for fp32, bf16, *faults in run_distributed(on_two_gpus, 2):
        for same, findings, waits in (fp32, bf16):
            assert same and not findings and not waits
        assert all(faults), faults
