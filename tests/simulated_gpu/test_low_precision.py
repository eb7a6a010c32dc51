"""Experts in low precision on a GPU: converted beside the backbone without a race, and the host waits for nothing more.
What must be there for that is taken out, one thing after another, and each time it is noticed."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from scmoe_ds.engine import connect
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.inference.model import TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.decisions import low_precision, low_precision_formats
from scmoe_ds.moe.decisions.low_precision import LowPrecision, LowPrecisionExperts
from scmoe_ds.moe.decisions.low_precision_formats import Scaled
from tests.helpers.exports import whole_model, write_export
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HIDDEN = 16
TOKENS = torch.randint(384, (3, 20), generator=torch.Generator().manual_seed(2))
ALL = LowPrecision("all", min_tokens=0)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    connect()
    model = whole_model(GPTSettings(4, HIDDEN, 2, 384, 24), {"num_experts": 4})
    return write_export(tmp_path_factory.mktemp("models") / "export", model)


@pytest.fixture(scope="module")
def usual(export: Path) -> Tensor:
    """Logits of a CPU in full precision."""
    with torch.inference_mode():
        return logits(serve(export, CPU))


def serve(export: Path, device: torch.device) -> GPT:
    trained = TrainedModel.open(export)
    return load_model(trained, serving_config(trained.config), torch.float32, device)


def logits(model: GPT, tokens: Tensor = TOKENS) -> Tensor:
    found = model(tokens).logits
    assert found is not None
    return found


def on_gpu(export: Path, capability: tuple[int, int], low: bool) -> tuple[Any, Tensor, str | None]:
    """The device after two passes, their logits, and the format."""
    with simulated_gpu(capability) as gpu:
        model = serve(export, CUDA)
        attached = use_low_precision(model, ALL) if low else None
        with torch.inference_mode():
            found = logits(model, gpu.move(TOKENS))
            found = found.cpu()
            again = logits(model, gpu.move(TOKENS)).cpu()  # in low precision with the scales of the first pass
        assert torch.equal(again, found)
        if attached is not None:
            assert all(each.counts.hot == each.counts.passes == 2 for each in attached.layers)
        return gpu, found, attached and attached.format


@pytest.mark.parametrize("capability, format, error", [((8, 0), "int8", 0.02), ((9, 0), "fp8", 0.1)])
def test_the_same_on_a_gpu(export: Path, usual: Tensor, capability: tuple[int, int], format: str, error: float) -> None:
    plain, _, _ = on_gpu(export, capability, False)
    gpu, found, used = on_gpu(export, capability, True)
    assert used == format
    assert gpu.findings == []
    assert sum(gpu.host_waits.values()) == sum(plain.host_waits.values())
    assert 0 < float((found - usual).norm() / usual.norm()) < error


def test_torchao_where_its_kernels_are_on(export: Path, usual: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, with as many products of torchao's as there were of torch's."""
    products: list[torch.Size] = []

    def int_scaled_matmul(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        products.append(rows.shape)
        return torch._int_mm(rows, weight) * scale

    _, expected, _ = on_gpu(export, (8, 0), True)
    intmm = SimpleNamespace(AUTOTUNER_ENABLE=True, intmm_triton=object(), int_scaled_matmul=int_scaled_matmul)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchao.kernel", SimpleNamespace(intmm=intmm))
    low_precision_formats.torchao_product.cache_clear()
    gpu, found, _ = on_gpu(export, (8, 0), True)
    intmm.AUTOTUNER_ENABLE = False
    low_precision_formats.torchao_product.cache_clear()
    assert low_precision_formats.torchao_product() is None
    low_precision_formats.torchao_product.cache_clear()
    assert products and all(rows >= 17 for rows, _ in products)
    assert gpu.findings == []
    torch.testing.assert_close(found, expected)


MISSING: dict[str, AbstractContextManager[Any]] = {
    "the computation waits for the conversion": mock.patch.object(LowPrecisionExperts, "_wait", lambda *args: None),
    "its memory is kept": mock.patch.object(Scaled, "record_stream", lambda *args: None),
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_must_be_there(export: Path, missing: str) -> None:
    with MISSING[missing]:
        gpu, *_ = on_gpu(export, (8, 0), True)
    assert gpu.findings != []


def test_on_the_same_stream_nothing_would_be_missing(export: Path) -> None:
    """The conversion runs beside the backbone: on its own stream, so that an order must be kept at all."""
    with (
        mock.patch.object(low_precision, "side_stream", mock.Mock()),
        mock.patch.object(torch.cuda, "stream", nullcontext),
    ):
        gpu, *_ = on_gpu(export, (8, 0), True)
    assert gpu.findings == []
