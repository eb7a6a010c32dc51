"""Which tensors of an engine are looked at before a save, and whose name a finding has."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scmoe_ds
from scmoe_ds.checkpoint import finite
from scmoe_ds.checkpoint.finite import NotFiniteError
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    connect()


def trained(**changes: Any) -> Any:
    """An engine after one step."""
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scmoe": {"num_experts": 2, "overlap": {"num_chunks": 1, "expert_slot": 1, "calibration_steps": 0}},
        **changes,
    }
    model = GPT(GPTSettings(2, 16, 2, 32, 16), scmoe_ds.ScMoEConfig.from_deepspeed(whole), 16)
    engine = scmoe_ds.initialize(model=model, config=whole)[0]
    tokens = torch.arange(32).view(2, 16)
    engine.backward(engine(tokens, labels=tokens).loss)
    engine.step()
    return engine


BF16 = {"bf16": {"enabled": True}}
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-0": {"zero_optimization": {"stage": 0}},
    "ZeRO-1, bf16, accumulated in fp32": {
        "zero_optimization": {"stage": 1},
        **BF16,
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "ZeRO-2, offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_every_tensor_is_looked_at(kind: str) -> None:
    engine = trained(**ENGINES[kind])
    finite.check(engine, "it")
    name, parameter = next((n, p) for n, p in engine.module.named_parameters() if "experts.1.input.weight" in n)
    for what, tensor in tensors_of(engine, parameter).items():
        element = tensor.view(-1)[tensor.numel() // 2 :][:1]
        before = element.clone()
        element.fill_(math.nan)
        with pytest.raises(NotFiniteError, match=rf"^it was not saved: on rank 0, {what} of {name} is nan"):
            finite.check(engine, "it")
        element.copy_(before)
    finite.check(engine, "it")


def tensors_of(engine: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Of a parameter, by DeepSpeed's own knowledge of where its parts lie."""
    inner = engine.optimizer
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is not None:
        flat = inner.optimizer.param_groups[mapping.param_group_index]["params"][0]
        address = mapping.hp_fragment_address
        moment = inner.optimizer.state[flat]["exp_avg_sq"].narrow(0, address.start, address.numel)
        return {
            "the weights": parameter.data,
            "the fp32 weights": mapping.hp_fragment.data,
            "exp_avg_sq in the optimizer": moment,
        }
    return {"the weights": parameter.data, "exp_avg in the optimizer": inner.state[parameter]["exp_avg"]}


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (1e30, "1e+30")])
def test_weights_whose_square_is_infinite(value: float, text: str) -> None:
    model = torch.nn.Linear(3, 3)
    torch.nn.init.ones_(model.weight)
    engine = SimpleNamespace(module=model, optimizer=None)
    assert finite._finding(engine) is None
    model.weight.data[1:, 2] = value
    found = finite._finding(engine)
    assert found is not None and found.startswith("the weights of weight are (2 elements) " + text)
