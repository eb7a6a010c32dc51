"""What only a GPU suffers from, and a machine without one can still see: memory that is given away too early, sums in
bf16, kernels that wait for the host, copies that do."""

from __future__ import annotations

import ast
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scmoe_ds
from scmoe_ds.comm.counts import start_counts
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.experts import grouped_experts, to_device
from scmoe_ds.moe.kernels import torch_product
from scmoe_ds.moe.layout import ExactLayout
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

D, E, ROWS = 8, 4, 4096


class Operators(TorchDispatchMode):
    """The names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Exchange:
    """Of two ranks, as NCCL's under torch 2.8 and later: nothing keeps what is being sent."""

    size = 2
    sent: weakref.ref[Tensor]

    def launch(
        self, received: Tensor, rows: Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Callable[[], object]:
        self.sent = weakref.ref(rows)
        received.fill_(7)
        return lambda: None


def test_counts_that_are_sent_are_kept_until_the_wait() -> None:
    exchange = Exchange()
    flight = start_counts(torch.arange(4), exchange, local=torch.arange(3))  # type: ignore[arg-type]
    gc.collect()
    assert exchange.sent() is not None
    assert flight.wait() == ([0, 1, 2], [7] * 4)
    assert exchange.sent() is None


NEEDS_GROUPED_MM = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="torch 2.6 has no grouped_mm"
)


def experts(dtype: torch.dtype = torch.bfloat16) -> Any:
    layer = scmoe_ds.ScMoE(D, MLP(GPTSettings(2, D, 2, 64, 8, ffn_hidden_size=16)), E)
    return layer.deepspeed_moe.experts.to(dtype)


@NEEDS_GROUPED_MM
def test_bias_gradients_over_many_rows() -> None:
    """The output bias's gradient is the sum of the rows' gradients. Added up in bf16, one after another, it is lost."""
    torch.manual_seed(0)
    local, counts = experts(), [ROWS, 0, 100, ROWS]
    rows, grad = torch.randn(sum(counts), D).bfloat16(), (1 + torch.rand(sum(counts), D)).bfloat16()
    output = grouped_experts(local, rows, counts, torch_product)
    with Operators() as ran:
        output.backward(grad)
    assert not {"index_add", "index_add_"} & ran.names.keys(), "on a GPU, in bf16 and in any order"
    for expert, part in zip(local.deepspeed_experts, grad.split(counts), strict=True):
        expected = part.double().sum(0)
        torch.testing.assert_close(expert.output.bias.grad.double(), expected, rtol=0.01, atol=0)
        if part.shape[0] == ROWS:
            scattered = torch.zeros(D, dtype=torch.bfloat16)
            for row in part:
                scattered += row
            assert ((scattered - expected).abs() > 0.5 * expected).all(), "the test would not see the fault"


@NEEDS_GROUPED_MM
def test_recomputed_activations_end_before_the_product() -> None:
    """Backward: two products for each of the two forward, and none again."""
    output = grouped_experts(experts(), torch.randn(12, D).bfloat16().requires_grad_(), [3, 0, 4, 5], torch_product)
    with Operators() as ran:
        output.backward(torch.randn(12, D).bfloat16())
    assert ran.names["_grouped_mm"] == 4


def test_gradients_of_tokens_with_many_choices() -> None:
    """Each token's is the sum over its rows, rounded once; dropped choices have none."""
    torch.manual_seed(0)
    T, K = 50, 6
    row_KT = torch.randperm(K * T).view(K, T)
    choice_R = torch.empty(K * T, dtype=torch.int64).scatter_(0, row_KT.flatten(), torch.arange(K * T))
    kept_KT = row_KT < K * T - 20
    row_KT[~kept_KT] = 0
    choice_R = choice_R[: K * T - 20]
    layout = ExactLayout(row_KT, choice_R, kept_KT, torch.zeros(()), torch.zeros(()))
    tokens = torch.randn(T, D).bfloat16().requires_grad_()
    rows = layout.encode(tokens)
    assert torch.equal(rows, tokens[choice_R % T])
    grad = torch.randn(rows.shape).bfloat16()
    with Operators() as ran:
        rows.backward(grad)
    assert not {"index_add", "index_add_"} & ran.names.keys()
    expected = torch.zeros(T, D, dtype=torch.float64).index_add_(0, choice_R % T, grad.double())
    assert tokens.grad is not None and torch.equal(tokens.grad, expected.float().bfloat16())


@pytest.mark.parametrize(
    "path",
    [
        "moe/expand.py",
        "moe/experts.py",
        "moe/kernels.py",
        "moe/choices.py",
        "moe/gate.py",
        "moe/layer.py",
        "moe/layout.py",
        "moe/logits.py",
        "moe/order.py",
        "moe/decode.py",
        "moe/per_rank.py",
        "moe/received.py",
        "moe/routed.py",
        "comm/all_to_all.py",
        "comm/counts.py",
        "overlap/executor.py",
        "comm/transport.py",
    ],
)
def test_no_tensor_is_made_of_numbers_on_the_device(path: str) -> None:
    """Such a copy comes from pageable memory: the host waits for all that the GPU has to do before."""
    tree = ast.parse((Path(scmoe_ds.__file__).parent / path).read_text())
    found = [
        f"{path}:{call.lineno}"
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name != "probe"  # before training starts
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("tensor", "as_tensor")
        and any(each.arg == "device" for each in call.keywords)
    ]
    assert not found


@NEEDS_SIMULATION
def test_a_mask_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory is pinned for its way to a GPU; a GPU's cannot be, and the host waits for what it reads of it."""
    with simulated_gpu() as gpu:
        there, here = gpu.move(torch.arange(3)), torch.arange(3)
        assert to_device(here, there.device).device == there.device and not gpu.host_waits
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "pin_memory", lambda *_: pytest.fail("memory of a GPU"))
            assert to_device(there, there.device) is there
            assert to_device(there, here.device).tolist() == [0, 1, 2]
        assert not gpu.findings
