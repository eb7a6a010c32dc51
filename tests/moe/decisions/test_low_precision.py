"""Products in low precision against fp64, and which device has which format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from scmoe_ds.checkpoint.reshard import put_weights
from scmoe_ds.engine import connect
from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference import low_precision as attaching
from scmoe_ds.inference.low_precision import choose_format, use_low_precision
from scmoe_ds.models.layers import MLP
from scmoe_ds.moe.decisions import low_precision_formats
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.decisions.low_precision_expert import Expert, Projection, of_grouped, of_two_projections
from scmoe_ds.moe.decisions.low_precision_formats import E4M3_MAX, FORMATS, INT8_MAX, Format, Int8
from scmoe_ds.moe.layer import StagedMoE
from tests.helpers.settings import GPT2, LLAMA

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_product_errs_by_the_rounding_of_its_factors(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows, weight, bias = torch.randn(33, 40).to(dtype), torch.randn(24, 40).to(dtype), torch.randn(24)
    rows[3] = 0
    int8 = FORMATS["int8"]
    scaled_rows, scaled_weight = int8.scaled(rows), int8.scaled(weight)
    found = int8.product(scaled_rows, scaled_weight, bias).double()
    exact = rows.double() @ weight.double().t() + bias
    # Each factor errs by half a step of its row: |x| dw + |w| dx + dx dw, summed over 40 terms.
    half_rows, half_weight = (each.double().abs().amax(1) / INT8_MAX / 2 for each in (rows, weight))
    bound = rows.double().abs().sum(1).unsqueeze(1) * half_weight + half_rows.unsqueeze(1) * weight.double().abs().sum(
        1
    )
    bound += 40 * half_rows.unsqueeze(1) * half_weight
    assert ((found - exact).abs() <= bound * (1 + 1e-4) + 1e-5).all()
    assert torch.equal(found[3], bias.double())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_matrix_and_kept_scales_give_the_same_bits(format: Format, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(21, 16).to(dtype)
    whole = format.scaled(matrix)
    with mock.patch.object(low_precision_formats, "AT_ONCE", 4 * 16):  # five blocks and a row
        found = [format.scaled(matrix), format.scaled(matrix, whole.scale_R1)]
    for values, scale_R1 in [*found, format.scaled(matrix, whole.scale_R1)]:
        assert torch.equal(values.float(), whole.values.float()) and torch.equal(scale_R1, whole.scale_R1)
    assert torch.equal(whole.scale_R1, format.scale(matrix))


def test_a_matrix_in_e4m3_errs_by_its_steps() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(9, 64) * torch.logspace(-3, 3, 9).unsqueeze(1)
    values, scale = FORMATS["fp8"].scaled(matrix)
    assert values.dtype == torch.float8_e4m3fn and float(values.float().abs().max()) == E4M3_MAX
    back = values.float() * scale
    # Three bits of mantissa: a sixteenth at most; below 2**-6 steps of 2**-9.
    assert ((back - matrix).abs() <= torch.maximum(matrix.abs() / 16, scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("settings", [GPT2, LLAMA], ids=["gelu", "swiglu"])
def test_experts_of_two_projections(settings: Any) -> None:
    torch.manual_seed(2)
    mlp = MLP(settings).requires_grad_(False)
    expert = Expert(
        (Projection(mlp.input.weight, mlp.input.bias),), mlp.activate, Projection(mlp.output.weight, mlp.output.bias)
    )
    check(expert, mlp, settings.hidden_size)


def test_experts_of_autoep() -> None:
    from deepspeed.moe.ep_experts import GroupedExperts

    torch.manual_seed(2)
    grouped = GroupedExperts(32, 48, 3, use_grouped_mm=False).requires_grad_(False)
    for weight in grouped.parameters():
        nn.init.normal_(weight, std=0.2)
    experts = of_grouped(grouped)
    assert len(experts) == 3
    counts = torch.tensor([0, 50, 0])
    check(experts[1], lambda rows: grouped(rows, counts), 32)


def check(expert: Expert, reference: Any, width: int) -> None:
    """Unchanged in full precision, and close to it in int8."""
    rows = torch.randn(50, width)
    exact = reference(rows)
    torch.testing.assert_close(expert.compute(rows), exact)
    int8 = FORMATS["int8"]
    found = expert.compute_in(int8, expert.convert(int8), rows)
    assert found.dtype == rows.dtype
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.03


def test_scales_are_kept_until_the_weights_change() -> None:
    torch.manual_seed(2)
    mlp = MLP(GPT2).requires_grad_(False)
    expert, int8 = of_two_projections(cast(Any, mlp)), FORMATS["int8"]

    def finds_scales() -> bool:
        """Whether a conversion does; it is right in any case."""
        with mock.patch.object(Int8, "scale", autospec=True, side_effect=Int8.scale) as scale:
            converted = expert.convert(int8)
        for (values, scale_R1), right in zip(converted, of_two_projections(cast(Any, mlp)).convert(int8), strict=True):
            assert torch.equal(values, right.values) and torch.equal(scale_R1, right.scale_R1)
        return scale.call_count > 0

    assert finds_scales() and not finds_scales()
    mlp.output.weight.mul_(3)
    assert finds_scales() and not finds_scales()
    mlp.load_state_dict({name: 2 * value for name, value in mlp.state_dict().items()})
    assert finds_scales() and not finds_scales()
    mlp.input.weight.data = mlp.input.weight.flip(0)
    assert finds_scales() and not finds_scales()
    saved = {name: 3 * value for name, value in mlp.state_dict().items()}
    checkpoint = SimpleNamespace(
        path=Path(), names=lambda: list(saved), shape=lambda name: saved[name].shape, read=saved.__getitem__
    )
    put_weights(SimpleNamespace(module=mlp), checkpoint)
    assert finds_scales() and not finds_scales()


def test_no_scale_is_kept_of_weights_made_in_inference_mode() -> None:
    """torch does not count what changes them."""
    with torch.inference_mode():
        weight = torch.randn(4, 8)
        expert = Expert((), lambda: weight, Projection(weight, None))
        expert.convert(FORMATS["int8"])
        weight.mul_(3)
        (converted,) = expert.convert(FORMATS["int8"])
        assert torch.equal(converted.scale_R1, FORMATS["int8"].scale(weight))


def test_int8_saturates_where_a_scale_is_too_small() -> None:
    matrix = torch.tensor([[-300.0, 2, 300]])
    assert FORMATS["int8"].scaled(matrix, torch.ones(1, 1)).values.tolist() == [[-127, 2, 127]]


@pytest.mark.parametrize("change", ["a pass with gradients", "paused"])
def test_scales_are_forgotten_where_weights_may_change_unseen(change: str) -> None:
    """An optimizer may write into them where torch does not count it."""
    connect()
    torch.manual_seed(2)
    hidden = torch.randn(2, 16, GPT2.hidden_size)

    def made() -> StagedMoE:
        layer = StagedMoE(GPT2.hidden_size, MLP(GPT2), 2, drop_tokens=False).eval()
        layer.set_deepspeed_parallelism()
        return layer

    def output(layer: StagedMoE) -> Tensor:
        with torch.no_grad():
            return layer(hidden)[0]

    layer, other = made(), made()
    settings = LowPrecision("all", score=1.0, min_tokens=0)
    attached = use_low_precision(layer, settings)
    before = output(layer)
    if change == "a pass with gradients":
        layer(hidden)
    with attached.paused() if change == "paused" else nullcontext():
        for weight in layer.parameters():
            weight.data.mul_(3)
    other.load_state_dict(layer.state_dict())
    use_low_precision(other, settings)
    assert torch.equal(output(layer), output(other)) and not torch.equal(output(layer), before)


def on_gpu(capability: tuple[int, int]) -> Any:
    known = {"get_device_capability": capability, "get_device_name": "GPU"}
    return mock.patch.multiple(torch.cuda, **{name: mock.Mock(return_value=value) for name, value in known.items()})


@pytest.mark.parametrize(
    "capability, names", [((8, 0), ["int8"]), ((8, 9), ["int8"]), ((9, 0), ["fp8", "int8"]), ((10, 0), ["fp8", "int8"])]
)
def test_a_gpu_takes_what_it_has(capability: tuple[int, int], names: Sequence[str]) -> None:
    with on_gpu(capability):
        assert choose_format(None, CUDA).name == names[0]
        assert [choose_format(name, CUDA).name for name in names] == list(names)


def test_refused_devices_and_formats() -> None:
    with on_gpu((7, 0)), pytest.raises(ArgumentError, match=r"7\.0\) has neither int8 nor fp8"):
        choose_format(None, CUDA)
    with on_gpu((8, 0)), pytest.raises(ArgumentError, match=r"format = fp8: GPU \(compute capability 8\.0\) has int8"):
        choose_format("fp8", CUDA)
    with pytest.raises(ArgumentError, match="format = fp8: device cpu has int8; use that"):
        choose_format("fp8", CPU)
    with pytest.raises(ArgumentError, match="must be one of int8, fp8"):
        choose_format("int4", CPU)


@pytest.mark.parametrize(
    "wrong", [{"ranks": "some"}, {"score": 0.0}, {"share": 1.5}, {"overload": 0.5}, {"min_tokens": -1}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} = {wrong[name]}: must"):
        LowPrecision(**wrong)


def test_refused_models() -> None:
    connect()
    with pytest.raises(ArgumentError, match="Linear has no MoE layer of this package"):
        use_low_precision(nn.Linear(2, 2), LowPrecision())
    layer = StagedMoE(8, nn.Linear(8, 8), 2)
    with pytest.raises(ArgumentError, match="not of two projections"):
        use_low_precision(layer, LowPrecision())
    layer = StagedMoE(32, MLP(GPT2), 2, dispatch="padded")
    with pytest.raises(ArgumentError, match="sends whole buffers, without row counts"):
        use_low_precision(layer, LowPrecision())
    layer = StagedMoE(32, MLP(GPT2), 2)
    names = list(layer.state_dict())
    assert use_low_precision(layer, LowPrecision()).format == "int8"
    assert list(layer.state_dict()) == names
    with pytest.raises(ArgumentError, match="does not go with low precision, as both change the experts of a layer"):
        use_low_precision(layer, LowPrecision())
    with pytest.raises(ArgumentError, match="has 8 × 6 weights, fp8 needs multiples of 16"):
        attaching._check_sizes("layer", [mock.Mock(is_cuda=True, shape=(8, 6))], FORMATS["fp8"])
