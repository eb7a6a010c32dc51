"""One copy of a token per rank against a row per choice: results, gradients, and bytes beside AutoEP's own exchange."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import tiny
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.exchange import Exchange
from scmoe_ds.moe.gate import Routing, route
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.layout import ExactLayout
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.replace.autoep import AutoEPMoELayer, ScheduledAutoEP

HIDDEN, EXPERTS, TOKENS, TOP_K = 16, 16, 24, 8
CASES: list[dict[str, Any]] = [
    {"k": 2},
    {"k": 2, "drop": True, "chunks": 3, "tokens": (24, 0, 24, 7)},
    {"k": 4, "chunks": 3},
    {"k": 4, "drop": True, "masked": True},
    {"k": 8, "drop": True},
    {"k": 8, "chunks": 3, "masked": True, "tokens": (0, 24, 1, 2)},
    {"k": 8, "tokens": (1, 0, 0, 0), "weigh_rows": True},
    {"k": 4, "drop": True, "chunks": 3, "weigh_rows": True},
    {"k": 4, "tokens": (0, 0, 0, 0)},
]


def make(k: int, drop: bool) -> StagedMoE:
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, HIDDEN))
    capacity: dict[str, Any] = {"capacity_factor": 0.7, "min_capacity": 1, "drop_tokens": drop}
    layer = StagedMoE(HIDDEN, expert, EXPERTS, dist.get_world_size(), k, top2_2nd_expert_sampling=False, **capacity)
    layer.set_deepspeed_parallelism()
    return layer.double()


def per_choice(exchange: Exchange, routing: Routing) -> ExactLayout:
    return ExactLayout.of(routing, exchange.slices, exchange.num_chunks)


def results(layer: StagedMoE, tokens: Tensor, used: Tensor | None, chunks: int, weigh_rows: bool) -> list[Tensor]:
    """Output, loss, and the gradients of the tokens, the gate and the experts."""
    torch.manual_seed(3)
    tokens = tokens.clone().requires_grad_()
    routing = route(layer.deepspeed_moe.gate, tokens, used)
    exchange = Exchange(layer.transport, layer.slices, num_chunks=chunks, weigh_rows=weigh_rows)
    routed = RoutedTokens(layer.deepspeed_moe.experts, tokens, routing, tokens.shape, exchange)
    for _ in range(chunks):
        routed.run_experts()
    output = routed.collect()
    loss = (output * torch.arange(HIDDEN)).sum() + output.square().sum() + routing.l_aux
    return [output, *torch.autograd.grad(loss, [tokens, *layer.parameters()], materialize_grads=True)]


def compare() -> list[float]:
    """The largest relative difference of each case."""
    rank, found = dist.get_rank(), []
    for case in CASES:
        layer, number = make(case["k"], case.get("drop", False)), case.get("tokens", [TOKENS] * 4)[rank]
        tokens = torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(rank)).double()
        used = torch.arange(number) % 3 != rank % 3 if "masked" in case else None
        given = layer, tokens, used, case.get("chunks", 1), case.get("weigh_rows", False)
        ours = results(*given)
        with mock.patch.object(Exchange, "layout", per_choice):
            expected = results(*given)
        pairs = zip(ours, expected, strict=True)
        worst = [
            float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1)) for a, b in pairs if a.numel()
        ]
        found.append(max(worst, default=0.0))
    return found


def bytes_beside_autoep() -> tuple[int, int, int]:
    """Of one forward and backward pass with 8 of 16 experts: rows of AutoEP, ours, and all else of ours."""
    section = {"overlap": {"calibration_steps": 0}}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0,
        "expert_parallel": {"enabled": True, "autoep_size": 2},
        "scmoe": section,
    }
    model = tiny("qwen3_moe", num_experts=16, num_experts_per_tok=TOP_K)
    engine, *_ = scmoe_ds.initialize(model=model, config=config)
    layer = next(each for each in engine.module.modules() if isinstance(each, ScheduledAutoEP))
    sent: Counter[bool] = Counter()
    theirs, ours = dist.all_to_all_single, Transport.launch

    def counting(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[input.shape[-1] == layer.hidden_size] += input.numel() * input.element_size()
        return theirs(output, input, *args, **kwargs)

    def launch(self: Transport, received: Tensor, rows: Tensor, *sizes: Any) -> Any:
        sent[rows.shape[-1] == layer.hidden_size] += rows.numel() * rows.element_size()
        return ours(self, received, rows, *sizes)

    found = []
    for forward, patch in (
        (lambda each: AutoEPMoELayer.forward(layer, each), mock.patch.object(dist, "all_to_all_single", counting)),
        (layer, mock.patch.object(Transport, "launch", launch)),
    ):
        sent.clear()
        with patch:
            output = forward(torch.randn(2, 64, layer.hidden_size, requires_grad=True))
            (output[0] if isinstance(output, tuple) else output).sum().backward()
        found += [sent[True], sent[False]]
    return found[0], found[2], found[3]


def check() -> tuple[list[float], tuple[int, int, int] | None]:
    return compare(), bytes_beside_autoep() if dist.get_world_size() == 2 else None


def test_two_ranks() -> None:
    sums = torch.zeros(3)
    for differences, sent in run_distributed(check, 2):
        assert max(differences) < 1e-12, differences
        sums += torch.tensor(sent)
    autoep, rows, others = sums.tolist()
    tokens, row = 2 * 2 * 64, 32 * 4
    assert autoep == 4 * TOP_K * tokens * row  # twice forward, twice backward
    assert 0.24 < rows / autoep <= 0.25  # nearly every token goes to both ranks
    # 8 bytes for each choice, and 8 of its gradient; each rank tells both how many of 8 experts, and rows
    assert others == 2 * 8 * TOP_K * tokens + 2 * 2 * (8 + 1) * 8


def test_four_ranks() -> None:
    for differences, _ in run_distributed(check, 4):
        assert max(differences) < 1e-12, differences
