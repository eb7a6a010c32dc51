"""Exact against padded dispatch on 1, 2 and 4 ranks: routing bit for bit, outputs and gradients, bytes on the wire."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.comm import transport as transport_module
from scmoe_ds.comm.transport import Transport

HIDDEN, TOKENS, EXPERTS = 16, 48, 8
ROUTINGS = ("random", "skewed", "all to one", "empty experts")


def make_layer(
    dispatch: str, k: int, drop_tokens: bool, method: str = "collective", wire_dtype: str | None = None
) -> ScMoE:
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 32), nn.GELU(), nn.Linear(32, HIDDEN))
    layer = ScMoE(
        HIDDEN,
        expert,
        EXPERTS,
        dist.get_world_size(),
        k,
        capacity_factor=1.0,
        min_capacity=1,
        drop_tokens=drop_tokens,
        top2_2nd_expert_sampling=False,
        dispatch=dispatch,
        all_to_all=method,
        wire_dtype=wire_dtype,
    )
    layer.set_deepspeed_parallelism()
    return layer


def steer(layer: ScMoE, x: Tensor, routing: str) -> Tensor:
    """Tokens that the gate sends where `routing` says: shifted along the weights of the expected experts."""
    weight = layer.deepspeed_moe.gate.wg.weight.detach()
    pull = weight / weight.norm(dim=1, keepdim=True)
    if routing == "skewed":
        return x + 2 * pull[0]
    if routing == "all to one":
        return 0.01 * x + 20 * pull[3]
    if routing == "empty experts":
        basis = torch.linalg.qr(weight[4:].T).Q  # remove what the last four experts would like, then push them away
        return x - x @ basis @ basis.T - 20 * pull[4:].sum(0)
    return x


def results(layer: ScMoE, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    routed = layer.begin(x)
    routing = routed.routing
    routed.run_experts()
    output, l_aux, counts = layer.finish(routed, x)
    grads = torch.autograd.grad(output.square().sum() + l_aux, [x, *layer.parameters()])
    return [routing.expert_KT, routing.location_KT, l_aux, counts, output, *grads]


def compare() -> list[int]:
    """Every routing × k × drop × method; returns how many tokens the busiest and the idlest expert got."""
    loads = []
    for routing in ROUTINGS:
        for k in (1, 2, 3):
            for drop_tokens in (True, False):
                for method in ("collective", "send_receive"):
                    padded = make_layer("padded", k, drop_tokens)
                    exact = make_layer("exact", k, drop_tokens, method)
                    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
                    x = steer(exact, x, routing)
                    case = f"{routing} k={k} drop={drop_tokens} {method}"
                    for number, (a, b) in enumerate(zip(results(padded, x), results(exact, x), strict=True)):
                        if number < 4:
                            assert torch.equal(a, b), f"{case}: routing"
                        else:
                            scale = a.abs().max().clamp(min=1)
                            assert (a - b).abs().max() <= 1e-6 * scale, f"{case}: result {number}"
                    if k == 1 and not drop_tokens and method == "collective":
                        counts = results(exact, x)[3]
                        loads += [int(counts.max()), int(counts.min())]
    return loads


def bytes_on_the_wire(wire_dtype: str | None) -> tuple[int, int]:
    """(sent, expected) bytes of one forward and backward pass, to other ranks and to itself."""
    sent = 0
    plain = Transport.launch

    def counting(self, received, rows, receive, send):  # type: ignore[no-untyped-def]
        nonlocal sent
        sent += rows.numel() * rows.element_size()
        return plain(self, received, rows, receive, send)

    layer = make_layer("exact", 2, True, wire_dtype=wire_dtype)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    transport_module.Transport.launch = counting  # type: ignore[method-assign]
    try:
        torch.manual_seed(5)
        routed = layer.begin(x.requires_grad_())
        expert_KT, (received,) = routed.routing.expert_KT.tolist(), routed._received
        routed.run_experts()
        layer.finish(routed, x)[0].sum().backward()
    finally:
        transport_module.Transport.launch = plain  # type: ignore[method-assign]
    kept = [(t, expert) for chosen_T in expert_KT for t, expert in enumerate(chosen_T) if expert >= 0]
    copies = {(t, expert // (EXPERTS // 2)) for t, expert in kept}
    assert len(copies) < len(kept)
    # Rows come back from the combine as many as went out; what this rank returns to others is what it received. For
    # each choice 8 bytes go out, and as many of their gradient come back. Each rank is told choices per expert, and rows.
    row = {None: 4 * HIDDEN, "bf16": 2 * HIDDEN, "fp8": HIDDEN + 4}[wire_dtype]
    rows, choices = len(copies) + sum(received.rows_P), len(kept) + sum(received.rows_per_expert)
    return sent, 2 * rows * row + choices * 8 + (EXPERTS + 2) * 8


def everything_dropped_on_one_rank() -> bool:
    """Used-token mask of zeros on rank 1: it keeps no choice, sends no row, and still does not leave rank 0 waiting."""
    layer = make_layer("exact", 1, True)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    used = torch.full((TOKENS,), 1 - dist.get_rank(), dtype=torch.int64)
    output, l_aux, _ = layer(x, used)
    (output.sum() + l_aux).backward()
    return bool(torch.isfinite(x.grad).all())


def idle_rank() -> bool:
    """Rank 1 has no tokens; both take part, and rank 1's experts learn from rank 0's tokens."""
    layer = make_layer("exact", 1, False)
    tokens = TOKENS if dist.get_rank() == 0 else 0
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    output, l_aux, _ = layer(x)
    (output.sum() + l_aux).backward()
    grads = [parameter.grad.abs().sum() for parameter in layer.deepspeed_moe.experts.parameters()]
    return output.shape == (tokens, HIDDEN) and bool(torch.stack(grads).sum() > 0)


def experts_of_another_shape() -> str:
    torch.manual_seed(1)
    width = 32 if dist.get_rank() == 0 else 64
    layer = ScMoE(HIDDEN, nn.Sequential(nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)), 4, 2)
    try:
        layer.set_deepspeed_parallelism()
    except ValueError as error:
        return str(error)
    return "no error"


def wire_errors() -> dict[str, float]:
    """Largest relative difference of the output per wire format."""
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    outputs = {wire: results(make_layer("exact", 1, False, wire_dtype=wire), x)[4] for wire in (None, "bf16", "fp8")}
    plain = outputs[None]
    return {str(wire): float((output - plain).abs().max() / plain.abs().max()) for wire, output in outputs.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_exact_equals_padded(ranks: int) -> None:
    for loads in run_distributed(compare, ranks):
        busiest = dict(zip(ROUTINGS, loads[::2], strict=True))
        idlest = dict(zip(ROUTINGS, loads[1::2], strict=True))
        assert busiest["all to one"] == TOKENS and idlest["empty experts"] == 0
        assert busiest["skewed"] > 2 * TOKENS / EXPERTS


@pytest.mark.parametrize("wire_dtype", [None, "bf16", "fp8"])
def test_bytes_on_the_wire_are_routed_rows_and_counts(wire_dtype: str | None) -> None:
    for sent, expected in run_distributed(bytes_on_the_wire, 2, wire_dtype):
        assert sent == expected


def test_a_rank_without_tokens() -> None:
    assert run_distributed(idle_rank, 2) == [True, True]


def test_a_rank_whose_tokens_are_all_unused() -> None:
    assert run_distributed(everything_dropped_on_one_rank, 2) == [True, True]


def test_experts_that_differ_between_ranks_are_an_error_on_every_rank() -> None:
    for message in run_distributed(experts_of_another_shape, 2):
        assert message.startswith("the shape of a layer's experts differs between ranks (rank 0: [")
        assert message.endswith("build the same model on all")


def test_wire_formats_cost_what_they_should() -> None:
    for errors in run_distributed(wire_errors, 2):
        assert errors["None"] == 0 < errors["bf16"] < 0.01 < 0.1 and errors["bf16"] < errors["fp8"] < 0.1
