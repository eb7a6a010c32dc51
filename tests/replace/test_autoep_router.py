"""The section's router beside AutoEP: the model's bias moves, and the z-loss reaches its router under every ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

import scmoe_ds
from lab.moe_families import EXPERTS, TOP_K, batch, tiny
from scmoe_ds import ScMoEConfig, ScMoEConfigError
from scmoe_ds.replace.autoep import ScheduledAutoEP
from tests.replace.test_autoep import config


def engine_of(family: str, router: dict[str, Any], stage: int = 1, *, bf16: bool = False, **model: Any) -> Any:
    whole = {**config(1, stage), "gradient_accumulation_steps": 2, "bf16": {"enabled": bf16}}
    whole["scmoe"] = {**whole["scmoe"], "router": router}
    return scmoe_ds.initialize(model=tiny(family, **model), config=whole)[0]


def layers_of(engine: Any) -> list[ScheduledAutoEP]:
    return [each for each in engine.module.modules() if isinstance(each, ScheduledAutoEP)]


@pytest.mark.parametrize(
    ("family", "rule", "bf16"),
    [("deepseek_v3", "sign", False), ("glm4_moe", "sign", True), ("longcat_flash", "proportional", True)],
)
def test_the_models_bias_moves_once_per_optimizer_step(family: str, rule: str, bf16: bool, tmp_path: Path) -> None:
    router = {"load_balance_coeff": 0.01, "load_balance_rule": rule}
    engine, counts = engine_of(family, router, bf16=bf16), {}
    layers = layers_of(engine)
    for layer in layers:
        counts[layer] = []
        layer.router.register_forward_hook(lambda module, args, out, layer=layer: counts[layer].append(out[2].long()))
    for step in range(2):
        before = [layer.router.e_score_correction_bias.clone() for layer in layers]
        for micro in range(2):
            engine.backward(engine(**batch(2 * step + micro, 0)).loss)
            engine.step()
        for layer, bias in zip(layers, before, strict=True):
            total = torch.stack(counts[layer]).sum(0)
            counts[layer].clear()
            assert total.sum() == 2 * 2 * 16 * TOP_K
            missing = 1 / len(total) - total.double() / total.sum()
            move = missing.sign() if rule == "sign" else missing
            move[EXPERTS:] = 0  # identity experts
            found = layer.router.e_score_correction_bias
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, bias + 0.01 * move.float(), atol=1e-7, rtol=1e-5)
            assert not torch.equal(found, bias)
    engine.save_checkpoint(str(tmp_path), tag="saved")
    resumed = engine_of(family, router, bf16=bf16)
    resumed.load_checkpoint(str(tmp_path), tag="saved")
    for one, other in zip(layers, layers_of(resumed), strict=True):
        assert torch.equal(one.router.e_score_correction_bias, other.router.e_score_correction_bias)


def gate_gradients(
    family: str, coefficient: float, stage: int, **model: Any
) -> tuple[list[Tensor], list[Tensor], float]:
    """Gradients of the routers' weights of a step of two micro-batches, and of the z-loss by hand."""
    engine = engine_of(family, {"z_loss_coefficient": coefficient}, stage, **model)
    layers, read = layers_of(engine), []
    for layer in layers:
        layer.router.register_forward_hook(lambda module, args, out: read.append(args[0].detach()))
    for micro in range(2):
        loss = engine(**batch(micro, 0)).loss
        engine.backward(loss)
        if micro == 0:
            engine.step()
    found = [safe_get_full_grad(layer.router.gate.weight).clone() for layer in layers]
    from deepspeed.runtime.zero import GatheredParameters

    by_hand = []
    for number, layer in enumerate(layers):
        with GatheredParameters([layer.router.gate.weight]):
            weight = layer.router.gate.weight.detach().clone().requires_grad_()
        tokens = [each for place, each in enumerate(read) if place % len(layers) == number]
        z = sum((each @ weight.t()).logsumexp(1).square().mean() for each in tokens) / 2
        by_hand.append(torch.autograd.grad(z, weight)[0])
    return found, by_hand, float(loss.detach())


@pytest.mark.parametrize(("family", "stage"), [("qwen3_moe", 1), ("deepseek_v3", 2), ("qwen3_moe", 3)])
def test_the_z_loss_reaches_the_router(family: str, stage: int) -> None:
    # Gradients of the last layer's router: those before get the z-losses of all layers behind them as well.
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.1} if family == "qwen3_moe" else {}
    plain, _, loss = gate_gradients(family, 0.0, stage, **more)
    found, by_hand, same = gate_gradients(family, 0.5, stage, **more)
    assert same == pytest.approx(loss)
    torch.testing.assert_close(found[-1] - plain[-1], 0.5 * by_hand[-1], atol=1e-5, rtol=1e-3)
    assert by_hand[-1].abs().max() > 1e-2


def test_the_models_own_balancing_loss_still_counts() -> None:
    (without, *_), (with_it, *_) = (
        gate_gradients("qwen3_moe", 0.0, 1, output_router_logits=True, router_aux_loss_coef=coefficient)
        for coefficient in (0.0, 1.0)
    )
    assert (with_it[0] - without[0]).abs().max() > 1e-4


def test_what_the_model_decides_is_refused() -> None:
    with pytest.raises(
        ScMoEConfigError, match=r"load_balance_coeff = 0.001: model\.layers\.0\.mlp \(qwen3_moe\) has no bias"
    ):
        engine_of("qwen3_moe", {"load_balance_coeff": 0.001})
    whole = config(1)
    whole["scmoe"] = {"router": {"score_func": "sigmoid"}}
    with pytest.raises(
        ScMoEConfigError, match=r'router\.score_func = "sigmoid": with expert_parallel .*the Hugging Face'
    ):
        ScMoEConfig.from_deepspeed(whole)
    with pytest.raises(ScMoEConfigError, match=r'router\.score_func = "model": is for models that AutoEP'):
        ScMoEConfig.from_deepspeed({"scmoe": {"router": {"score_func": "model"}}})


def test_loads_are_written_to_the_monitors(tmp_path: Path) -> None:
    whole = {**config(1), "steps_per_print": 2, "csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    engine = scmoe_ds.initialize(model=tiny("deepseek_v3"), config=whole)[0]
    counts = torch.zeros(EXPERTS)

    def count(module: Any, args: Any, out: Any) -> None:
        counts.add_(out[2])

    layers_of(engine)[0].router.register_forward_hook(count)
    for step in range(4):
        if step == 2:
            counts.zero_()  # what was written is not counted again
        engine.backward(engine(**batch(step, 0)).loss)
        engine.step()
    (path,) = tmp_path.rglob("*layer_0_max_over_mean*.csv")
    rows = path.read_text().splitlines()
    assert len(rows) == 3  # a heading, and two of four steps
    assert float(rows[-1].split(",")[1]) == pytest.approx(float(counts.max() / counts.mean()))
