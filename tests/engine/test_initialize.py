"""`scmoe_ds.initialize` takes what `deepspeed.initialize` takes, and says what the section was applied to."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

import scmoe_ds
from scmoe_ds import ScMoE, ScMoEConfigError
from scmoe_ds.config.loading import load
from scmoe_ds.replace.layer import HookedScMoE
from tests.helpers.blocks import Block
from tests.helpers.hugging_face import TEXT_SHAPE

ADAM = {"lr": 1e-2, "weight_decay": 0.1}


def whole(**section: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "scmoe": {"overlap": {"calibration_steps": 0}, **section},
    }


class Model(nn.Module):
    def __init__(self, **moe: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        moe = {"k": 2, "min_capacity": 1, **moe}
        self.blocks = nn.ModuleList([Block(nn.Linear(8, 8)), Block(MoE(8, nn.Linear(8, 8), 4, **moe))])

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.square().mean()


class WithScMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = ScMoE(8, nn.Linear(8, 8), 4, min_capacity=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.moe(hidden)[0].square().mean()


def train(engine: Any, steps: int = 2) -> list[float]:
    losses = []
    for step in range(steps):
        loss = engine(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def test_the_arguments_are_deepspeeds_in_its_order() -> None:
    ours, theirs = (list(inspect.signature(each).parameters) for each in (scmoe_ds.initialize, deepspeed.initialize))
    assert ours == theirs


@pytest.mark.parametrize("name", ["config", "config_params", "args"])
@pytest.mark.parametrize("kind", ["path", "dict", "loaded"])
def test_the_json_under_each_of_its_names(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(whole()))
    value: Any = {"path": str(path), "dict": whole(), "loaded": load(whole())}[kind]
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", str(path)])
    given = {"args": args} if name == "args" else {name: value}
    engine, optimizer, *_ = scmoe_ds.initialize(model=WithScMoE(), **given)
    assert optimizer is engine.optimizer and len(train(engine)) == 2
    assert args.deepspeed_config == str(path), "the caller's own is as it was"


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: scmoe_ds.initialize(model=WithScMoE()), "got no DeepSpeed JSON: give it one of config"),
    "two": (
        lambda: scmoe_ds.initialize(model=WithScMoE(), config=whole(), config_params=whole()),
        "got config and config_params",
    ),
    "a model in the place of args": (lambda: scmoe_ds.initialize(WithScMoE(), whole()), "hand over model="),
    "no optimizer": (
        lambda: scmoe_ds.initialize(model=WithScMoE(), config=without_optimizer(1)),
        r'zero_optimization\.stage = 1: ZeRO needs an optimizer: add an "optimizer" section',
    ),
    "DeepSpeed's layers": (
        lambda: scmoe_ds.initialize(model=Model(), config=whole()),
        r'the first blocks\.1\.mlp\); set "replace": true',
    ),
    "another kind of DeepSpeed's": (
        lambda: scmoe_ds.initialize(model=Model(), config=whole(architecture="shared_expert")),
        'are "topk"; set that',
    ),
    "experts": (
        lambda: scmoe_ds.initialize(model=WithScMoE(), config=whole(num_experts=64)),
        r"scmoe\.num_experts = 64: moe has 4; set that",
    ),
    "merge": (
        lambda: scmoe_ds.initialize(model=WithScMoE(), config=whole(merge="cg2")),
        r"scmoe\.merge = 'cg2': moe has",
    ),
    "parameters that are used up": (
        lambda: scmoe_ds.initialize(model=Model(), config=whole(replace=True), model_parameters=iter([])),
        "model_parameters is empty",
    ),
    "a dense model to replace in": (
        lambda: scmoe_ds.initialize(model=nn.Linear(8, 8), config=whole(replace=True)),
        r"Linear holds no MoE layer.*scmoe_ds\.moe_from_dense",
    ),
    "a ScMoE to replace": (
        lambda: scmoe_ds.initialize(model=WithScMoE(), config=whole(replace=True)),
        r"scmoe\.replace: moe is a ScMoE already; remove the field",
    ),
    "all is frozen": (
        lambda: scmoe_ds.initialize(model=WithScMoE().requires_grad_(False), config=whole()),
        "optimizer: every parameter of the model is frozen",
    ),
    "a dense model": (lambda: scmoe_ds.initialize(model=nn.Linear(8, 8), config=whole()), "Linear holds no MoE layer"),
    "a MoE of Hugging Face": (
        lambda: scmoe_ds.initialize(model=mixtral(), config=whole()),
        r"\(2 × MixtralSparseMoeBlock are none\)",
    ),
}


def without_optimizer(stage: int) -> dict[str, Any]:
    changed = {**whole(), "zero_optimization": {"stage": stage}}
    del changed["optimizer"]
    return changed


def mixtral() -> nn.Module:
    shape = transformers.MixtralConfig(**TEXT_SHAPE, num_hidden_layers=2, num_key_value_heads=1, num_local_experts=2)
    return transformers.MixtralForCausalLM(shape)


@pytest.mark.parametrize("case", WRONG)
def test_what_nothing_answers_to_is_an_error(case: str) -> None:
    attempt, message = WRONG[case]
    with pytest.raises(ScMoEConfigError, match=message):
        attempt()


def test_an_expert_parallel_layer_needs_its_groups() -> None:
    scmoe_ds.connect()
    layer = ScMoE(8, nn.Linear(8, 8), 4, ep_size=2)
    with pytest.raises(RuntimeError, match=r"call layer\.set_deepspeed_parallelism\(\) \(or initialize the engine\)"):
        layer.begin(torch.randn(2, 8))


def test_the_remedies_work() -> None:
    for section in ({"replace": True}, {"architecture": "topk"}):
        engine, *_ = scmoe_ds.initialize(model=Model(), config=whole(**section))
        train(engine)
    engine, optimizer, *_ = scmoe_ds.initialize(model=WithScMoE(), config=without_optimizer(0))
    assert optimizer is None and torch.isfinite(engine(torch.randn(2, 6, 8)))


def test_the_log_says_what_the_section_applies_to(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="scmoe_ds")
    scmoe_ds.initialize(model=Model(), config=whole(replace=True))
    assert "replaced 1 MoE layer of Model by ScMoE: blocks.1.mlp" in caplog.text and "applies to" not in caplog.text
    caplog.clear()
    scmoe_ds.initialize(model=WithScMoE(), config=whole())
    assert 'the "scmoe" section applies to 1 ScMoE (moe): 4 experts, top-1' in caplog.text
    assert "no schedule: the experts run where your model calls run_experts" in caplog.text


def test_settings_that_layers_were_built_without_are_named(caplog: pytest.LogCaptureFixture) -> None:
    scmoe_ds.initialize(model=Model(), config=whole(replace=True, min_capacity=99, drop_tokens=True, wire_dtype="bf16"))
    scmoe_ds.initialize(model=WithScMoE(), config=whole(dispatch="padded", min_capacity=1))
    said = [each.message.partition(": ")[2] for each in caplog.records if each.message.startswith("not applied")]
    assert said == ["scmoe.min_capacity = 99, blocks.1.mlp has 1", "scmoe.dispatch = 'padded', moe has 'exact'"]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, **ADAM}]


HANDED_OVER: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "a generator": lambda model: {"model_parameters": model.parameters()},
    "a list": lambda model: {"model_parameters": list(model.parameters())},
    "names": lambda model: {"model_parameters": model.named_parameters()},
    "a group": lambda model: {"model_parameters": {"params": model.parameters()}},
    "a group with names": lambda model: {"model_parameters": [{"params": model.named_parameters()}]},
    "a group for each": lambda model: {"model_parameters": ({"params": each} for each in model.parameters())},
    "groups": lambda model: {"model_parameters": groups_of(model)},
    "an optimizer": lambda model: {"optimizer": torch.optim.AdamW(groups_of(model), lr=1e-2)},
    "an optimizer and parameters": lambda model: {
        "optimizer": torch.optim.AdamW(groups_of(model), lr=1e-2),
        "model_parameters": list(model.parameters()),
    },
    "a function": lambda model: {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2)},
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_replacement_beside_an_optimizer_or_parameters_of_the_users(case: str) -> None:
    model = Model()
    engine, *_ = scmoe_ds.initialize(model=model, config=whole(replace=True), **HANDED_OVER[case](model))
    layer = next(each for each in model.modules() if isinstance(each, HookedScMoE))
    new = {name: parameter for name, parameter in layer.named_parameters() if not name.startswith("deepspeed_moe")}
    assert {"mlp.weight", "mlp.bias", "coefficient.weight", "coefficient.bias", "shortcut_norm.weight"} <= new.keys()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    held = [parameter for group in engine.optimizer.bit16_groups for parameter in group]
    assert len({id(each) for each in held}) == len(held) == len(before), "each parameter once"
    train(engine)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, "everything is trained"
    if case in ("groups", "an optimizer"):
        options = zip(engine.optimizer.param_groups, engine.optimizer.bit16_groups, strict=True)
        decay = {id(parameter): group["weight_decay"] for group, members in options for parameter in members}
        assert {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.0} == {
            name for name, parameter in model.named_parameters() if parameter.ndim == 1
        }
