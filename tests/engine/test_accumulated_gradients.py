"""Gradients and their norm under DeepSpeed's keys, against sums of the micro-batches' gradients in fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

import scmoe_ds
from scmoe_ds.config.deepspeed_gradients import check_norm
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT, GPTOutput
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.swin import SwinMoE, initialize_swin
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.overlap.executor import PairOutput

SECTION = {"num_experts": 2, "drop_tokens": False, "use_rts": False, "overlap": {"calibration_steps": 0}}
BF16 = {"bf16": {"enabled": True}}
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's bf16 optimizer collects garbage some twenty times while it is made, to report the memory."""
    monkeypatch.setattr("deepspeed.runtime.bf16_optimizer.see_memory_usage", lambda *_, **__: None)


def make_gpt() -> nn.Module:
    model = GPT(GPTSettings(2, 16, 2, 32, 8), ScMoEConfig(**SECTION))
    initialize_parameters(model, 1, 0.1, 2)
    return model


def make_swin() -> nn.Module:
    settings = SwinSettings(16, 4, 8, (1, 1, 2, 2), (1, 1, 2, 2), num_classes=10, patch_size=1, num_channels=1)
    model = SwinMoE(settings, ScMoEConfig(**SECTION))
    initialize_swin(model, 1)
    return model


def loss_of(model: Any, number: int) -> Tensor:
    """Of one micro-batch; uses the output's attributes, as the training loop does."""
    generator = torch.Generator().manual_seed(number)
    if isinstance(getattr(model, "module", model), SwinMoE):
        labels = torch.randint(10, (2,), generator=generator)
        return model(torch.randn(2, 1, 16, 16, generator=generator), labels=labels).loss
    tokens = torch.randint(32, (2, 9), generator=generator)
    return model(tokens[:, :-1], labels=tokens[:, 1:]).loss


@cache
def summed(make: Callable[[], nn.Module], dtype: torch.dtype, steps: int) -> tuple[Gradients, float]:
    model = make().to(dtype)
    total = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in model.named_parameters()}
    for number in range(steps):
        model.zero_grad()
        loss_of(model, number).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.double() / steps
    return total, norm_of(total)


def norm_of(gradients: Gradients) -> float:
    return float(torch.stack([each.square().sum() for each in gradients.values()]).sum().sqrt())


def weights(engine: Any) -> Gradients:
    found = {
        name: safe_get_full_fp32_param(each) if hasattr(each, "_hp_mapping") else each.detach()
        for name, each in engine.module.named_parameters()
    }
    return {name: weight.double().clone() for name, weight in found.items()}


def trained(
    make: Callable[[], nn.Module], keys: dict[str, Any], steps: int, direct: bool = False
) -> tuple[Gradients, float | None]:
    """What DeepSpeed makes of a second step over the same micro-batches; plain SGD at rate 1 shows its gradient."""
    whole = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_allow_untested_optimizer": True,
        "scmoe": SECTION,
        **keys,
    }
    connect()
    engine, *_ = scmoe_ds.initialize(model=make(), config=whole)
    for rate in (0.0, 1.0):
        before = weights(engine)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        for number in range(steps):
            loss = loss_of(engine, number)
            if direct:
                loss.backward()
            else:
                engine.backward(loss)
            engine.step()
    after, norm = weights(engine), engine.get_global_grad_norm()
    engine.destroy()
    return {name: before[name] - after[name] for name in before}, None if norm is None else float(norm)


def check(make: Callable[[], nn.Module], keys: dict[str, Any], steps: int, **how: bool) -> None:
    precise = not keys.get("bf16") and not keys.get("torch_autocast")
    tolerance = 1e-4 if precise and keys.get("data_types") != {"grad_accum_dtype": "bf16"} else 0.015
    expected, expected_norm = summed(make, torch.bfloat16 if keys.get("bf16") else torch.float32, steps)
    found, norm = trained(make, keys, steps, **how)
    if norm is not None:
        assert norm == pytest.approx(expected_norm, rel=tolerance)
    assert (norm is None) == (keys["zero_optimization"]["stage"] == 0)
    wrong = {name: norm_of({name: found[name] - expected[name]}) for name in expected}
    assert max(wrong.values()) < tolerance * expected_norm, max(wrong, key=lambda name: wrong[name])


def case(stage: int, **keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **keys}


@pytest.mark.parametrize("sums", [None, "fp32", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_accumulation(stage: int, precision: str, sums: str | None) -> None:
    keys = case(
        stage, **(BF16 if precision == "bf16" else {}), **({"data_types": {"grad_accum_dtype": sums}} if sums else {})
    )
    if stage == 0 and (precision == "bf16" or sums == "bf16"):
        with pytest.raises(ScMoEConfigError, match=r"set (stage 1 or 2|zero_optimization\.stage to 1)"):
            trained(make_gpt, keys, 1)
        return
    for steps in (1, 4, 8):
        check(make_gpt, keys, steps)


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_for_images(stage: int) -> None:
    check(make_swin, case(stage, **BF16, data_types={"grad_accum_dtype": "fp32"}), 4)


@pytest.mark.parametrize(
    "keys",
    [
        case(1, gradient_predivide_factor=2.0),
        case(1, prescale_gradients=True, gradient_predivide_factor=2.0),
        {"zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 500}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500}},
        pytest.param(
            {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False, "parameter_alignment": True}},
            marks=pytest.mark.skipif(
                "parameter_alignment" not in DeepSpeedZeroConfig.model_fields,
                reason="DeepSpeed 0.19.7 is the first with parameter_alignment",
            ),
        ),
        {
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
        case(1, **BF16, communication_data_type="fp32"),
        case(1, **BF16, data_types={"grad_accum_dtype": "fp32", "param_dtype": "bf16"}),
        case(1, wall_clock_breakdown=True),
        case(2, flops_profiler={"enabled": True, "profile_step": 1}),
    ],
    ids=str,
)
def test_keys_of_the_backward_pass(keys: dict[str, Any]) -> None:
    check(make_gpt, keys, 4)


@pytest.mark.parametrize("make", [make_gpt, make_swin])
def test_backward_called_on_the_loss_itself(make: Callable[[], nn.Module]) -> None:
    """DeepSpeed then divides by the steps in hooks on the output's tensors; the loss's parts are such tensors too."""
    check(make, case(1), 4, direct=True)
    check(make, case(1, **BF16, data_types={"grad_accum_dtype": "fp32"}), 4, direct=True)


REFUSED = {
    "contiguous_gradients": {"zero_optimization": {"stage": 1, "contiguous_gradients": False}},
    "prescale_gradients": case(2, prescale_gradients=True),
    "gradient_predivide_factor": case(2, gradient_predivide_factor=2.0),
    "torch_autocast": case(1, torch_autocast={"enabled": True, "dtype": "float16"}),
    "sequence_parallel_size": case(1, sequence_parallel_size=2),
}


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_would_give_other_gradients(key: str) -> None:
    with pytest.raises(ScMoEConfigError, match=rf"^(zero_optimization\.)?{key}.* = .*(remove it|use)"):
        trained(make_gpt, REFUSED[key], 1)


def test_layouts_in_which_deepspeeds_norm_is_wrong() -> None:
    check_norm({}, 1, False)
    check_norm({"gradient_clipping": 0}, 2, False)
    check_norm(case(1), 2, True)
    with pytest.raises(ScMoEConfigError, match=r"zero_optimization\.stage = 0: .*= 1\.0\).* set stage 1"):
        check_norm({}, 2, False)
    summed_in_fp32: dict[str, Any] = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    check_norm(case(1, **summed_in_fp32), 2, False)
    check_norm(case(2, **summed_in_fp32), 2, True)
    with pytest.raises(ScMoEConfigError, match=r"data_types\.grad_accum_dtype = \"fp32\": .*stage to 2"):
        check_norm(case(1, **summed_in_fp32), 2, True)


def test_an_output_that_hides_its_tensors_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Hidden:
        loss: Tensor

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_gpt()

        def forward(self, *args: Any, **kwargs: Any) -> Hidden:
            return Hidden(self.model(*args, **kwargs).loss)

    with pytest.raises(ScMoEConfigError, match="returns Hidden, and no tensor"):
        trained(Wrapped, case(1), 1)


def test_outputs_are_dicts_and_tuples() -> None:
    """What DeepSpeed, torch and Hugging Face's Trainer read; the fields stay attributes, None is left out."""
    model, tokens = make_gpt(), torch.zeros(1, 8, dtype=torch.int64)
    output = model(tokens, labels=tokens)
    assert isinstance(output, dict) and set(output) == {"loss", "lm_loss", "moe_loss", "exp_counts"}
    assert output["loss"] is output.loss is output[0] and output.logits is None
    assert isinstance(output.exp_counts, tuple) and output.task_loss is output.lm_loss
    assert set(model(tokens)) == {"moe_loss", "exp_counts", "logits"}
    mapped: GPTOutput = torch.utils._pytree.tree_map(lambda each: each * 2, output)
    assert torch.equal(mapped.loss, 2 * output.loss)
    pair, hooked = model.runs[0], []
    pair.register_full_backward_hook(lambda _, __, grads: hooked.append(grads[0].shape))
    hidden = torch.randn(1, 8, 16, requires_grad=True)
    found = pair(hidden)
    assert isinstance(found, PairOutput) and isinstance(found, tuple)
    found.hidden.sum().backward()
    assert hooked == [hidden.shape]
