"""The classes and functions: values that DeepSpeed or torch would take, or fail at in words of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import scmoe_ds
from scmoe_ds.errors import ScMoEConfigError
from tests.programs.mistakes.workplace import DATA, JSON, TRAIN, run, write_json

LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "negative capacity": ({"capacity_factor": -1}, r"capacity_factor = -1: must be a finite number above 0"),
    "no capacity": ({"capacity_factor": 0}, r"capacity_factor = 0: must be a finite number above 0"),
    "capacity as text": ({"capacity_factor": "1.0"}, r"capacity_factor = '1\.0': must be a finite number"),
    "capacity that is no number": ({"capacity_factor": float("nan")}, r"capacity_factor = nan: must be a finite"),
    "capacity in evaluation": ({"eval_capacity_factor": -2}, r"eval_capacity_factor = -2: must be a finite number"),
    "negative minimum": ({"min_capacity": -1}, r"min_capacity = -1: must be at least 0"),
    "half a token": ({"min_capacity": 1.5}, r"min_capacity = 1\.5: must be a whole number of at least 0"),
    "no experts": ({"num_experts": 0}, r"num_experts = 0: must be at least 1"),
    "experts as text": ({"num_experts": "4"}, r"num_experts = '4': must be a whole number of at least 1"),
    "experts as a float": ({"num_experts": 4.0}, r"num_experts = 4\.0: must be a whole number"),
    "experts as a switch": ({"num_experts": True}, r"num_experts = True: must be a whole number"),
    "k as text": ({"k": "1"}, r"k = '1': must be a whole number"),
    "k as a float": ({"k": 1.5}, r"k = 1\.5: must be a whole number"),
    "k too large": ({"k": 5}, r"k = 5 must be between 1 and num_experts = 4"),
    "no ranks": ({"ep_size": 0}, r"ep_size = 0: must be at least 1"),
    "negative ranks": ({"ep_size": -1}, r"ep_size = -1: must be at least 1"),
    "ranks as text": ({"ep_size": "2"}, r"ep_size = '2': must be a whole number"),
    "no width": ({"hidden_size": 0}, r"hidden_size = 0: must be at least 1"),
    "width as text": ({"hidden_size": "8"}, r"hidden_size = '8': must be a whole number"),
    "no expert": ({"expert": None}, r"expert = None: must be a module"),
    "the expert's class": ({"expert": nn.Linear}, r"expert = <class .*: must be a module"),
    "a list of experts": ({"expert": [nn.Linear(8, 8)]}, r"expert = \[Linear.*: must be a module"),
    "noise in small letters": (
        {"noisy_gate_policy": "rsample"},
        r"noisy_gate_policy = 'rsample': must be one of None,",
    ),
    "noise for one expert": (
        {"noisy_gate_policy": "RSample", "k": 2},
        r"noisy_gate_policy = 'RSample': goes with k = 1",
    ),
    "drop as text": ({"drop_tokens": "no"}, r"drop_tokens = 'no': must be True or False"),
    "drop as a number": ({"drop_tokens": 1}, r"drop_tokens = 1: must be True or False"),
    "random drop as text": ({"use_rts": "x"}, r"use_rts = 'x': must be True or False"),
    "Tutel": ({"use_tutel": True}, r"use_tutel: this layer brings its own dispatch; leave it False"),
    "another merge": ({"merge": "cg3"}, r"merge = 'cg3': must be one of 'add', 'cg1', 'cg2'"),
}


def layer(**changes: Any) -> scmoe_ds.ScMoE:
    return scmoe_ds.ScMoE(**{"hidden_size": 8, "expert": nn.Linear(8, 8), "num_experts": 4, **changes})


@pytest.mark.parametrize("case", LAYER)
def test_a_layer(case: str) -> None:
    changes, message = LAYER[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        layer(**changes)


TOKENS = torch.zeros(2, 3, 8)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "chunks as text": (lambda: layer().begin(TOKENS, num_chunks="2"), r"num_chunks = '2': must be a whole number"),
    "half a chunk": (lambda: layer().begin(TOKENS, num_chunks=1.5), r"num_chunks = 1\.5: must be a whole number"),
    "mask as a list": (lambda: layer().begin(TOKENS, [1] * 6), r"used_token is a list: must be a tensor"),
    "choice as a list": (lambda: layer().begin(TOKENS, exclude=[0] * 6), r"exclude is a list: must be a tensor"),
    "choice of other tokens": (
        lambda: layer().begin(TOKENS, exclude=torch.zeros(5).long()),
        r"exclude of shape \(5,\): must have one element for each of the 6 tokens",
    ),
    "choice as floats": (
        lambda: layer().begin(TOKENS, exclude=torch.zeros(6)),
        r"exclude of dtype torch\.float32: must be integers",
    ),
    "slot as text": (lambda: scmoe_ds.Schedule("2"), r"Schedule\(.*: expert_slot and num_chunks must be whole numbers"),
    "half a slot": (lambda: scmoe_ds.Schedule(1.5), r"Schedule\(.*: expert_slot and num_chunks must be whole numbers"),
    "no slot": (lambda: scmoe_ds.Schedule(None), r"Schedule\(.*: expert_slot and num_chunks must be whole numbers"),
    "chunks of a schedule": (lambda: scmoe_ds.Schedule(2, "2"), r"Schedule\(.*must be whole numbers"),
    "arguments in the other order": (
        lambda: scmoe_ds.replace_moe_layers(JSON, nn.Linear(2, 2)),
        r"model is a dict: hand over the model",
    ),
    "no model to put back": (lambda: scmoe_ds.undo_replacement(None), r"model is a NoneType: hand over the model"),
    "no dense model": (lambda: scmoe_ds.moe_from_dense(None, JSON), r"model is a NoneType: hand over the model"),
    "a loss instead of a model": (lambda: scmoe_ds.load_balancing_loss(TOKENS), r"model is a Tensor: hand over"),
    "parameters instead of a model": (
        lambda: scmoe_ds.parameter_groups(nn.Linear(2, 2).parameters()),
        r"model is a generator: hand over the model",
    ),
    "overlap as a switch": (lambda: scmoe_ds.ScMoEConfig(overlap=True), r"scmoe\.overlap = true: .*write an object"),
    "a position that is none": (lambda: scmoe_ds.ScMoEConfig(position="pos9"), r".* = \"pos9\": must be 'pos1',"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call(case: str) -> None:
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = layer()


def test_an_engine_is_no_model(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    whole = {**JSON, "scmoe": {"tap": "{previous}:output", "position": "pos3"}}
    engine, *_ = scmoe_ds.initialize(model=model, config=whole, optimizer=torch.optim.AdamW(model.parameters()))
    assert (
        "optimizer of the DeepSpeed JSON: not used, because initialize got its own; remove one of them" in caplog.text
    )
    assert 'no effect on these layers of architecture "scmoe": scmoe.position, scmoe.tap' in caplog.text
    with pytest.raises(ScMoEConfigError, match=r"^model is a DeepSpeed engine already: hand over engine\.module"):
        scmoe_ds.initialize(model=engine, config=JSON)


@pytest.mark.parametrize(
    ("section", "idle"),
    [
        ({"architecture": "topk", "merge": "add", "position": "pos1"}, "scmoe.merge, scmoe.position"),
        ({"architecture": "shared_expert", "merge": "add"}, "scmoe.merge"),
        ({"architecture": "dgmoe", "merge": "cg1", "position": "pos1"}, "scmoe.merge"),
        ({"architecture": "scmoe", "tap": "{previous}:output"}, "scmoe.tap"),
        ({"architecture": "scmoe", "merge": "cg1", "position": "pos1"}, None),
    ],
)
def test_a_setting_that_the_architecture_does_not_know(
    section: dict[str, Any], idle: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    write_json("bad.json", {"scmoe": {"num_experts": 4, **section}})
    assert run(f"{TRAIN} {DATA} --deepspeed_config bad.json") == 0
    found = re.findall(r"no effect on these layers of architecture .*: (.*)", capfd.readouterr().out)
    assert found == ([idle] if idle else [])
