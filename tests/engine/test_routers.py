"""An engine's steps: the correction bias moves once for all micro-batches, and the z-loss follows the model's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scmoe_ds
from scmoe_ds import RouterConfig, ScMoE, ScMoEConfigError
from scmoe_ds.moe.gate import route
from tests.engine.test_initialize import whole

BALANCED = RouterConfig(score_func="sigmoid", load_balance_coeff=0.01, z_loss_coefficient=0.05)


class Model(nn.Module):
    def __init__(self, router: RouterConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = ScMoE(8, nn.Linear(8, 8), 4, k=2, merge="add", drop_tokens=False, router=router)
        self.moe.deepspeed_moe.gate.wg.weight.data.normal_()

    def forward(self, hidden: Tensor, kind: str = "tensor") -> Any:
        output = self.moe(hidden)[0]
        loss = output.square().mean()
        return {"tensor": loss, "tuple": (loss, output), "dict": {"loss": loss, "logits": output}, "none": output}[kind]


def engine_of(router: RouterConfig, **keys: Any) -> Any:
    config = {**whole(num_experts=4, top_k=2, merge="add"), "gradient_accumulation_steps": 2, **keys}
    return scmoe_ds.initialize(model=Model(router), config=config)[0]


def batch(number: int) -> Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(number))


def step(engine: Any, number: int) -> list[int]:
    """One optimizer step of two micro-batches; tokens per expert of both, counted from the routing."""
    gate, dtype = engine.module.moe.deepspeed_moe.gate, engine.module.moe.deepspeed_moe.gate.wg.weight.dtype
    counts = torch.zeros(4, dtype=torch.int64)
    for micro in range(2):
        hidden = batch(2 * number + micro).to(dtype)
        gate.eval()  # is not counted
        counts += route(gate, hidden.flatten(0, 1)).exp_counts
        gate.train()
        before = gate.e_score_correction_bias.clone()
        engine.backward(engine(hidden))
        assert torch.equal(gate.e_score_correction_bias, before), "moves with the optimizer, not with a micro-batch"
        engine.step()
    return counts.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bias_moves_once_per_optimizer_step(precision: str, tmp_path: Path) -> None:
    keys = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    engine, bias = engine_of(BALANCED, **keys), torch.zeros(4)
    gate = engine.module.moe.deepspeed_moe.gate
    for number in range(3):
        counts = step(engine, number)
        bias += torch.tensor([0.01 * ((count < 12) - (count > 12)) for count in counts])
        assert gate.e_score_correction_bias.dtype == torch.float32
        torch.testing.assert_close(gate.e_score_correction_bias, bias)
    assert bias.abs().max() > 0.005
    engine.save_checkpoint(str(tmp_path), tag="saved")
    resumed = engine_of(BALANCED, **keys)
    resumed.load_checkpoint(str(tmp_path), tag="saved")
    for number in range(3, 5):
        step(engine, number), step(resumed, number)
    states = [each.module.state_dict() for each in (engine, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_the_z_loss_counts_like_the_models_loss(kind: str) -> None:
    """Under accumulation, and for every form of output; compared with the loss by hand."""
    engine, plain = engine_of(BALANCED), Model(BALANCED.model_copy(update={"z_loss_coefficient": 0.0}))
    for micro in range(2):
        output = engine(batch(micro), kind)
        loss = output if kind == "tensor" else output[0] if kind == "tuple" else output["loss"]
        engine.backward(loss)
        logits = batch(micro).flatten(0, 1) @ plain.moe.deepspeed_moe.gate.wg.weight.t()
        by_hand = plain(batch(micro)) + 0.05 * logits.logsumexp(1).square().mean()
        torch.testing.assert_close(loss, plain(batch(micro)))
        (by_hand / 2).backward()
        if micro == 0:
            engine.step()
    from deepspeed.utils import safe_get_full_grad

    found = safe_get_full_grad(engine.module.moe.deepspeed_moe.gate.wg.weight)
    torch.testing.assert_close(found, plain.moe.deepspeed_moe.gate.wg.weight.grad)


def test_a_model_without_a_loss_is_refused() -> None:
    engine = engine_of(BALANCED)
    with pytest.raises(ScMoEConfigError, match=r"scmoe\.router\.z_loss_coefficient: the model returned no loss"):
        engine(batch(0), "none")
    with torch.no_grad():
        assert engine(batch(0), "none").shape == (2, 6, 8)
