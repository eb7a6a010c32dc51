"""Which kernels a device gets, that DeepSpeed's get what they take, and that all of them compute the same."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from packaging.version import Version
from torch import Tensor

import scmoe_ds
from scmoe_ds.compat import weighted_restore
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe import kernels
from scmoe_ds.moe.decode import decode
from scmoe_ds.moe.experts import grouped_experts, is_linear, product_for, run_experts
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.kernels import PLAIN, Kernels, choose_kernels, kernels_of, packed_swiglu, plain_swiglu
from scmoe_ds.moe.linear_experts import linear_experts
from scmoe_ds.moe.top1 import Top1Kernels
from tests.simulated_gpu.plain_top1 import PLAIN_TOP1

D, E = 8, 4
NEEDS_GROUPED_MM = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="torch 2.6 has no grouped_mm"
)


def experts() -> Any:
    layer = scmoe_ds.ScMoE(D, MLP(GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=16)), E)
    return layer.deepspeed_moe.experts.bfloat16()


@pytest.fixture(autouse=True)
def choose_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "triton_runs", lambda: True)
    choose_kernels.cache_clear()
    yield
    choose_kernels.cache_clear()


@pytest.mark.parametrize("swiglu, bias", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_experts_have_the_bits_of_separate_ones(swiglu: bool, bias: bool, dtype: torch.dtype) -> None:
    settings = GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=16, swiglu=swiglu, add_bias_linear=bias)
    members = scmoe_ds.ScMoE(D, MLP(settings), E).deepspeed_moe.experts.to(dtype)
    members.deepspeed_experts[2].requires_grad_(False)
    for rows, counts in ((torch.randn(15, D), [3, 0, 4, 8]), (torch.randn(0, D), [0] * E)):
        rows = rows.to(dtype).requires_grad_()
        layers = [each.input for each in members.deepspeed_experts], [each.output for each in members.deepspeed_experts]
        whole = linear_experts(members.deepspeed_experts[0].activate, *layers, rows, counts)
        separate, direction = run_experts(members, rows, counts), torch.randn(rows.shape).to(dtype)
        assert torch.equal(whole, separate)
        needed = [rows, *(each for each in members.parameters() if each.requires_grad)]
        assert len(needed) == 1 + (E - 1) * (4 if bias else 2)
        found, expected = (torch.autograd.grad(each, needed, direction) for each in (whole, separate))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        rows.requires_grad_(False)
        again = linear_experts(members.deepspeed_experts[0].activate, *layers, rows, counts)
        assert all(
            torch.equal(a, b)
            for a, b in zip(torch.autograd.grad(again, needed[1:], direction), expected[1:], strict=True)
        )


def test_only_linear_layers_are_computed_together() -> None:
    class Adapter(torch.nn.Linear): ...

    rows = torch.zeros(1, D, dtype=torch.bfloat16)
    expert = experts().deepspeed_experts[0]
    assert is_linear(expert, rows) and not is_linear(expert, rows.float())
    with torch.autocast("cpu"):
        assert not is_linear(expert, rows)
    hook = expert.output.register_forward_hook(lambda *_: None)
    assert not is_linear(expert, rows)
    hook.remove()
    expert.input = Adapter(D, 16).bfloat16()
    assert not is_linear(expert, rows)


def rows_on(capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, rows: int = 1) -> Any:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"), shape=(rows, D))


@pytest.mark.parametrize(
    ("capability", "triton", "kernel"),
    [
        ((7, 5), True, None),
        ((8, 0), False, None),
        ((8, 0), True, kernels.triton_product),
        ((8, 9), False, None),
        pytest.param((9, 0), False, kernels.torch_product, marks=NEEDS_GROUPED_MM),
        pytest.param((10, 3), False, kernels.torch_product, marks=NEEDS_GROUPED_MM),
        ((11, 0), False, None),
        ((12, 0), False, None),
    ],
)
def test_grouped_products_by_device(
    capability: tuple[int, int], triton: bool, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed.get_accelerator(), "prefer_triton_grouped_mm", lambda: triton)
    assert product_for(experts(), rows_on(capability, torch.bfloat16, monkeypatch)) is kernel
    assert product_for(experts(), rows_on(capability, torch.bfloat16, monkeypatch, rows=0)) is None
    for dtype in (torch.float32, torch.float16):
        assert product_for(experts(), rows_on(capability, dtype, monkeypatch)) is None
    pair = scmoe_ds.ScMoE(D, MLP(GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=16)), 2).deepspeed_moe.experts.bfloat16()
    assert product_for(pair, rows_on(capability, torch.bfloat16, monkeypatch)) is None
    odd = scmoe_ds.ScMoE(D, MLP(GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=12)), E).deepspeed_moe.experts.bfloat16()
    assert product_for(odd, rows_on(capability, torch.bfloat16, monkeypatch)) is None


def test_fused_kernels_where_triton_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(deepspeed.get_accelerator(), "is_triton_supported", lambda: True)
    monkeypatch.setattr(kernels, "weighted_restore", lambda: restore)
    monkeypatch.setattr(kernels, "packed_swiglu", lambda: swiglu)
    monkeypatch.setattr(kernels, "top1_kernels", lambda: PLAIN_TOP1)
    for dtype in kernels.FUSED:
        chosen = kernels_of(rows_on((8, 0), dtype, monkeypatch))
        assert chosen.restore is restore and chosen.swiglu is swiglu and chosen.top1 is PLAIN_TOP1
    caplog.clear()  # which has them if another test has turned the log on
    with caplog.at_level(logging.INFO):
        assert kernels_of(rows_on((8, 6), torch.float64, monkeypatch)) == PLAIN
        assert kernels_of(rows_on((7, 0), torch.bfloat16, monkeypatch)) == PLAIN
        monkeypatch.setattr(deepspeed.get_accelerator(), "is_triton_supported", lambda: False)
        for _ in range(2):
            assert kernels_of(rows_on((8, 7), torch.float16, monkeypatch)) == PLAIN
    assert [record.message.split(":")[1] for record in caplog.records] == 3 * [
        " grouped product none, weighted restore torch's, SwiGLU torch's, top-1 gate torch's"
    ]
    assert "compute capability 8.7 in float16" in caplog.text
    assert kernels_of(torch.zeros(1)) is PLAIN


def test_triton_that_cannot_compile_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No C compiler on the node, say: found out by a first kernel, before any is needed."""

    def choose(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler\n  stack")

    monkeypatch.undo()
    kernels.triton_runs.cache_clear()
    monkeypatch.setattr(kernels, "top1_kernels", lambda: Top1Kernels(choose, *3 * (choose,)))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(1, 1))
    for name in ("is_triton_supported", "prefer_triton_grouped_mm"):
        monkeypatch.setattr(deepspeed.get_accelerator(), name, lambda: True)
    with caplog.at_level(logging.INFO, "scmoe_ds"):
        for dtype in kernels.FUSED:
            assert kernels_of(rows_on((8, 0), dtype, monkeypatch)) == PLAIN
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1 and told[0].endswith("torch's kernels are used: Failed to find C compiler")
    kernels.triton_runs.cache_clear()


def restore(rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What DeepSpeed's kernel computes and takes for granted, in plain PyTorch."""
    assert row_TK.is_contiguous() and weight_TK.is_contiguous() and weight_TK.dtype == torch.float32
    kept_TK = row_TK >= 0
    # The gradient of a row is written by its choice. A row without one would keep what was in memory.
    assert torch.equal(row_TK[kept_TK].sort().values, torch.arange(len(rows_RD)))
    parts_TKD = rows_RD.float()[row_TK.clamp(min=0)] * (weight_TK * kept_TK).unsqueeze(2)
    return parts_TKD.sum(1).to(rows_RD.dtype)


def swiglu(inner: Tensor) -> Tensor:
    return plain_swiglu(inner)


@pytest.mark.parametrize("K, dropped", [(1, 0), (1, 9), (2, 9), (3, 0)])
def test_a_fused_restore_decodes_alike(K: int, dropped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    T, R = 30, K * 30 - dropped
    order_X = torch.randperm(K * T)
    number_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(K * T))
    kept_KT = (number_X < R).view(K, T)
    maps = torch.where(kept_KT, number_X.view(K, T), 0), order_X
    rows_RD, weight_KT = torch.randn(R, D, requires_grad=True), (torch.rand(K, T) * kept_KT).requires_grad_()
    direction_TD, results = torch.randn(T, D), []
    for fused in (None, restore):
        monkeypatch.setattr("scmoe_ds.moe.decode.kernels_of", lambda _, fused=fused: Kernels(restore=fused))
        output_TD = decode(rows_RD, *maps, weight_KT, kept_KT if dropped else None)
        grad_RD, grad_KT = torch.autograd.grad(output_TD, (rows_RD, weight_KT), direction_TD)
        results.append((output_TD, grad_RD, grad_KT * kept_KT))
    for plain, by_kernel in zip(*results, strict=True):
        torch.testing.assert_close(by_kernel, plain, rtol=1e-6, atol=1e-6)
    # Padded rows may be empty: no kernel is asked.
    decode(torch.randn(R + 3, D), *maps, weight_KT, padded=True)


def test_no_rows_or_tokens_for_a_fused_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scmoe_ds.moe.decode.kernels_of", lambda _: Kernels(restore=lambda *_: pytest.fail("called")))
    for R, T in ((0, 5), (0, 0)):
        rows, weights = torch.zeros(R, D, requires_grad=True), torch.zeros(1, T)
        maps = torch.zeros(1, T, dtype=torch.int64), torch.arange(T)
        decode(rows, *maps, weights, torch.zeros(1, T, dtype=torch.bool)).sum().backward()
        assert rows.grad is not None


def test_swiglu_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    swiglu = Kernels(swiglu=lambda inner: called.append(inner.shape) or plain_swiglu(inner))  # type: ignore[func-returns-value]
    monkeypatch.setattr("scmoe_ds.models.layers.kernels_of", lambda _: swiglu)
    MLP(GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=16, swiglu=True))(torch.randn(3, D))
    assert called == [(3, 32)]


@pytest.mark.parametrize("missing", ["module", "class", "signature", "Triton"])
def test_an_older_or_newer_deepspeed_means_plain_torch(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(forward: Any, available: bool = True) -> Any:
        return SimpleNamespace(_FusedWeightedRestore=SimpleNamespace(forward=forward), is_available=lambda: available)

    def known(ctx: Any, combined_rows: Any, top_scores: Any, inverse: Any, top_k: Any) -> None: ...

    fused, name = module(known), "autoep_fused_token_ops"
    package = SimpleNamespace(is_triton_available=lambda: missing != "Triton", **{name: fused})
    monkeypatch.setitem(sys.modules, "deepspeed.ops.triton_ops", package)
    assert weighted_restore() is not None
    monkeypatch.setitem(sys.modules, "deepspeed.ops.triton_ops.swiglu_triton", SimpleNamespace(swiglu_packed=swiglu))
    assert (packed_swiglu() is swiglu) == (missing != "Triton")
    if missing == "module":
        delattr(package, name)
        monkeypatch.setitem(sys.modules, "deepspeed.ops.triton_ops.swiglu_triton", None)
        assert packed_swiglu() is None
    else:
        others = {
            "class": SimpleNamespace(),
            "signature": module(lambda ctx, rows: None),
            "Triton": module(known, False),
        }
        setattr(package, name, others[missing])
    assert weighted_restore() is None


@pytest.mark.skipif(
    Version(deepspeed.__version__) < Version("0.19.6"),
    reason="DeepSpeed before 0.19.6 has its kernel in another module",
)
def test_deepspeeds_product_takes_what_it_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, with the kernel's formula in plain PyTorch."""

    def by_group(rows: Tensor, weights: Tensor, ends: Tensor, trans_b: bool) -> Tensor:
        assert trans_b and weights.is_contiguous() and ends.dtype == torch.int32
        parts = torch.tensor_split(rows, ends[:-1].tolist())
        return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])

    monkeypatch.setattr("deepspeed.ops.triton_ops.group_gemm_triton", by_group)
    local, rows, counts = experts(), torch.randn(12, D).bfloat16(), [3, 0, 4, 5]
    grouped = grouped_experts(local, rows, counts, kernels.triton_product)
    torch.testing.assert_close(grouped, run_experts(local, rows, counts), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("drop, use_rts", [(True, True), (True, False), (False, True)])
def test_fused_top1_is_the_gate(drop: bool, use_rts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of equals a GPU keeps the first ones. A CPU keeps others, which is imitated there.
    monkeypatch.setattr("scmoe_ds.moe.choices._equals_at", lambda *_: False)
    for seed in range(60):
        torch.manual_seed(seed)
        T, experts, factor = random.Random(seed).choices(range(1, 40), k=3)
        gate = TopKGate(D, experts, 1, factor / 20, min_capacity=0, drop_tokens=drop, use_rts=use_rts)
        results = []
        for fused in (None, PLAIN_TOP1):
            monkeypatch.setattr("scmoe_ds.moe.gate.kernels_of", lambda _, fused=fused: Kernels(top1=fused))
            torch.manual_seed(seed)
            x = torch.randn(T, D).requires_grad_()
            found = route(gate, x)
            grads = torch.autograd.grad(found.l_aux + found.weight_KT.square().sum(), [x, gate.wg.weight])
            choices, order = found.choices, found.choices.order
            places = [order.choice_X, order.place_KT, choices.counts_E, choices.rows_E]
            results.append([found.expert_KT, found.weight_KT, found.l_aux, *places, torch.rand(1), *grads])
        assert all(map(torch.equal, *results)), seed


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs without a GPU")
@pytest.mark.skipif(Version(deepspeed.__version__) < Version("0.19.8"), reason="DeepSpeed has these from 0.19.8 on")
def test_kernels_in_tritons_interpreter() -> None:
    """In a process of their own: Triton decides when it is imported."""
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "agree" in ended.stdout
