"""Precision, offloading, clipping and optimizers under DeepSpeed, against a loop of plain PyTorch in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from scmoe_ds.config.deepspeed_settings import check_accelerator
from scmoe_ds.engine import connect, parameter_groups
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings

STEPS, MICRO_BATCHES, CLIP, ADAM = 4, 4, 0.5, {"lr": 3e-3, "eps": 1e-4, "weight_decay": 0.1}
SETTINGS = GPTSettings(2, 32, 4, 64, 32)
JSON: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": MICRO_BATCHES // 2,
    "optimizer": {"type": "AdamW", "params": {**ADAM, "torch_adam": True}},
    "gradient_clipping": CLIP,
    "zero_optimization": {"stage": 1},
    "scmoe": {
        "num_experts": 4,
        "expert_parallel_size": 2,
        "all_to_all": "collective",
        "overlap": {"calibration_steps": 0},
    },
}
Curve = list[tuple[float, float]]  # loss and gradient norm before clipping, per step


def tokens(number: int) -> Tensor:
    return torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(number))


def build(ep_size: int, recompute: Any = None) -> GPT:
    section = {**JSON["scmoe"], "expert_parallel_size": ep_size}
    model = GPT(SETTINGS, scmoe_ds.ScMoEConfig.from_deepspeed({"scmoe": section}), recompute=recompute)
    initialize_parameters(model, 7, 0.1, SETTINGS.num_layers)
    return model


def reference() -> Curve:
    """One process, no DeepSpeed: accumulate, norm over all parameters, clip, AdamW."""
    connect()
    model = build(1)
    optimizer, curve = torch.optim.AdamW(parameter_groups(model), **ADAM), []
    for step in range(STEPS):
        total = 0.0
        for number in range(MICRO_BATCHES):
            batch = tokens(step * MICRO_BATCHES + number)
            loss = model(batch[:, :-1], labels=batch[:, 1:]).loss / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, CLIP / norm.item())
        optimizer.step()
        optimizer.zero_grad()
        curve.append((total, norm.item()))
    return curve


def train(changes: dict[str, Any], make_optimizer: Callable[[GPT], Any] | None, **kwargs: Any) -> tuple[Curve, str]:
    """The same under DeepSpeed on two expert-parallel ranks; also the dtype of the weights."""
    config, changes = copy.deepcopy(JSON), dict(changes)
    model, optimizer = build(2, changes.pop("recompute", None)), None
    config["zero_optimization"].update(changes.get("zero_optimization", {}))
    config.update({key: value for key, value in changes.items() if key != "zero_optimization"})
    if make_optimizer is not None:
        del config["optimizer"]
        optimizer = make_optimizer(model)
    engine, *_ = scmoe_ds.initialize(model=model, config=config, optimizer=optimizer, **kwargs)
    torch.manual_seed(0)  # an expert adds up its rows in the order of the capacity limit's random numbers
    curve = []
    for step in range(STEPS):
        total = torch.zeros(())
        for number in range(dist.get_rank(), MICRO_BATCHES, 2):
            batch = tokens(step * MICRO_BATCHES + number)
            loss = engine(batch[:, :-1], labels=batch[:, 1:]).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / MICRO_BATCHES
        dist.all_reduce(total)
        curve.append((total.item(), float(engine.get_global_grad_norm())))
    return curve, str(next(engine.module.parameters()).dtype)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **ADAM)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16 = {"bf16": {"enabled": True}}
OWN: dict[str, Callable[[GPT], Any]] = {
    "an optimizer": lambda model: adamw(parameter_groups(model)),
    "a function": lambda model: adamw,
}
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "ZeRO-1": ({}, None),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, None),
    "offload, ZeRO-1": ({"zero_optimization": OFFLOAD}, None),
    "offload, ZeRO-2": ({"zero_optimization": {"stage": 2, **OFFLOAD}}, None),
    "bf16, ZeRO-1": (BF16, None),
    "bf16, ZeRO-2": ({**BF16, "zero_optimization": {"stage": 2}}, None),
    "bf16, offload": ({**BF16, "zero_optimization": {"stage": 2, **OFFLOAD}}, None),
    "bf16 summed in fp32, ZeRO-1": ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, None),
    "divided before the sum, ZeRO-1": ({"prescale_gradients": True, "gradient_predivide_factor": 2.0}, None),
    "overlapped reduction, ZeRO-2": (
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}},
        None,
    ),
    "full recomputation, ZeRO-2": ({"recompute": "full", "zero_optimization": {"stage": 2}}, None),
    "an optimizer, ZeRO-1": ({}, "an optimizer"),
    "an optimizer, offload": ({"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False}, "an optimizer"),
    "a function, ZeRO-2": ({"zero_optimization": {"stage": 2}}, "a function"),
}


def train_all() -> tuple[dict[str, tuple[Curve, str]], dict[str, str]]:
    """Curves by case, and the messages of what is refused."""
    curves = {name: train(changes, own and OWN[own]) for name, (changes, own) in CASES.items()}
    pipeline = deepspeed.pipe.PipelineModule([torch.nn.Linear(1, 1)], 1)
    refused = {
        "PipelineModule": lambda: scmoe_ds.initialize(model=pipeline, config=JSON),
        "scheduler": lambda: train_with_scheduler(),
        "offload": lambda: train({"zero_optimization": OFFLOAD}, OWN["an optimizer"]),
    }
    messages = {}
    for name, attempt in refused.items():
        with pytest.raises(scmoe_ds.ScMoEConfigError) as raised:
            attempt()
        messages[name] = str(raised.value)
    return curves, messages


def train_with_scheduler() -> None:
    model = build(2)
    optimizer = adamw(parameter_groups(model))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    config = {key: value for key, value in JSON.items() if key != "optimizer"}
    scmoe_ds.initialize(model=model, config=config, optimizer=optimizer, lr_scheduler=scheduler)


@pytest.fixture(scope="module")
def results() -> tuple[Curve, tuple[dict[str, tuple[Curve, str]], dict[str, str]]]:
    expected = run_distributed(reference, 1)[0]
    (curves, messages), (others, _) = run_distributed(train_all, 2)
    assert curves == others, "all ranks report the same"
    return expected, (curves, messages)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_plain_pytorch(case: str, results: Any) -> None:
    expected, (curves, _) = results
    curve, dtype = curves[case]
    tolerance = 2e-2 if "bf16" in case else 1e-5
    assert dtype == ("torch.bfloat16" if "bf16" in case else "torch.float32")
    assert min(norm for _, norm in expected) > CLIP, "every step is clipped"
    assert [loss for loss, _ in curve] == pytest.approx([loss for loss, _ in expected], rel=tolerance)
    assert [norm for _, norm in curve] == pytest.approx([norm for _, norm in expected], rel=2 * tolerance)


def test_where_the_optimizer_comes_from_changes_nothing(results: Any) -> None:
    curves, _ = results[1]
    assert curves["an optimizer, ZeRO-1"] == curves["ZeRO-1"], "the same optimizer, made by hand"
    assert curves["full recomputation, ZeRO-2"] == curves["ZeRO-2"]
    for offloaded, kept in [
        ("offload, ZeRO-1", "ZeRO-1"),
        ("offload, ZeRO-2", "ZeRO-2"),
        ("bf16, offload", "bf16, ZeRO-2"),
    ]:
        # The norm is summed in another order, and enters through clipping.
        assert [curves[offloaded][0][step] for step in range(STEPS)] == [
            pytest.approx(each, rel=1e-6) for each in curves[kept][0]
        ]


def test_what_cannot_run_says_what_to_do(results: Any) -> None:
    _, messages = results[1]
    assert "hand over the plain module" in messages["PipelineModule"]
    assert 'set "zero_force_ds_cpu_optimizer": false' in messages["offload"]
    assert "made for the optimizer's 2 parameter group(s)" in messages["scheduler"]
    assert "lr_scheduler=lambda optimizer" in messages["scheduler"]


def test_fp16_where_it_is_not_supported() -> None:
    if deepspeed.get_accelerator().is_fp16_supported():
        pytest.skip("this accelerator computes in fp16")
    with pytest.raises(scmoe_ds.ScMoEConfigError, match=r"fp16\.enabled = true: the accelerator .* use bf16"):
        check_accelerator({"fp16": {"enabled": True}})


@pytest.mark.skipif(not deepspeed.get_accelerator().is_fp16_supported(), reason="no fp16 on this accelerator")
def test_fp16_trains_or_skips() -> None:
    curve, dtype = run_distributed(train, 2, {"fp16": {"enabled": True, "initial_scale_power": 8}}, None)[0]
    assert dtype == "torch.float16" and curve[-1][0] < curve[0][0] + 0.1
