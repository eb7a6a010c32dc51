"""The gate and the layouts on a GPU: the host waits for nothing, and the values are the CPU's, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from scmoe_ds.moe.gate import route
from scmoe_ds.moe.layout import ExactLayout, PaddedLayout
from scmoe_ds.moe.slices import TokenSlices
from tests.simulated_gpu.cases import fused_gate
from tests.simulated_gpu.device import NEEDS_SIMULATION, simulated_gpu

pytestmark = NEEDS_SIMULATION

HIDDEN, EXPERTS, TOKENS = 16, 4, 40
SLICED = TokenSlices(rank=1, tensor_parallel_size=2, expert_parallel_size=2)
LAYOUTS = (
    (ExactLayout, TokenSlices(), 1),
    (ExactLayout, TokenSlices(), 3),
    (ExactLayout, SLICED, 1),
    (ExactLayout, SLICED, 2),
)
PADDED = ((PaddedLayout, TokenSlices(), 1), (PaddedLayout, TokenSlices(), 3), (PaddedLayout, SLICED, 2))


def results(gate: nn.Module, x: Tensor, layout: Any, slices: TokenSlices, chunks: int, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(3)
    routing = route(gate, x, **kwargs)
    rows = layout.of(routing, slices, chunks)
    sent = rows.encode(x)
    kept = routing.choices.rows_E.sum() if layout is ExactLayout else sent.shape[0]
    loss = routing.l_aux + routing.weight_KT.square().sum()
    below = torch.arange(sent.shape[0], device=sent.device) < kept  # on a GPU rows follow that nobody gets
    loss = loss + (sent.float() * below.unsqueeze(1) * torch.linspace(0.5, 1, HIDDEN, device=x.device)).sum()
    grads = torch.autograd.grad(loss, [x, *gate.parameters()])
    choices = [routing.expert_KT, routing.location_KT, routing.weight_KT, routing.l_aux, routing.exp_counts]
    return [*choices, rows.row_of_choice_KT, sent, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_wait_in_any_mode(k: int, masked: bool, drop: bool, dtype: torch.dtype) -> None:
    """Only padded buffers whose size follows from counts are waited for, once."""
    torch.manual_seed(0)
    # Masked tokens use up random numbers on a GPU. So those of a second draw would differ from a CPU's.
    noises = (None, "Jitter", "RSample") if k == 1 and not (masked and drop) else (None,)
    for number, (layout, slices, chunks) in enumerate((*LAYOUTS, *PADDED)):
        gate = TopKGate(HIDDEN, EXPERTS, k, 0.8, min_capacity=1, noisy_gate_policy=noises[number % len(noises)])
        gate.drop_tokens, gate.top2_2nd_expert_sampling = drop, number % 2 == 0
        gate, x = gate.to(dtype), torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
        mask = {"used_token": torch.rand(TOKENS) < 0.7} if masked else {}
        exclude = {"exclude_T": torch.randint(-1, EXPERTS, (TOKENS,))} if k == 1 and number % 2 else {}
        softmax: Any = {"softmax": ("deepspeed", "all", "chosen", "kept")[number % 4]}
        expected = results(gate, x, layout, slices, chunks, **mask, **exclude, **softmax)
        # Masks, noise, excluded experts and other weights take the plain way beside fused kernels, too.
        with simulated_gpu() as gpu, fused_gate() if number % 4 == 0 or noises != (None,) else nullcontext():
            moved = {name: gpu.move(each) for name, each in (mask | exclude).items()} | softmax
            gate, x = gpu.move(gate), gpu.move(x)
            results(gate, x, layout, slices, chunks, **moved)  # DeepSpeed makes its distributions at the first use
            gpu.reset()
            found = results(gate, x, layout, slices, chunks, **moved)
            assert not gpu.findings
            reads = layout is PaddedLayout and (masked or not drop)
            assert sum(gpu.host_waits.values()) == int(reads), gpu.host_waits
            atomic = {each.operator for each in gpu.launches if each.phase == "backward" and each.part == "encode"}
            assert not atomic & {"index_add", "index_add_", "index_put_", "scatter_add", "scatter_add_"}
            values = [gpu.peek(each) for each in found]
        rows = expected[6].shape[0]
        for theirs, ours in zip(expected, [*values[:6], values[6][:rows], *values[7:]], strict=True):
            assert torch.equal(theirs, ours)
