"""Decisions between the gate and the dispatch: what rules and experts are told, and that the rows go where they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.early import Decision, rerouted
from scmoe_ds.moe.experts import OwnExperts, run_experts
from scmoe_ds.moe.gate import TOLERANT, Routing
from scmoe_ds.moe.slices import TokenSlices

HIDDEN, EXPERTS, TOKENS = 8, 4, (6, 9)


class Probable:
    """A routing rule that keeps choices above the mean score."""

    in_training = False

    def apply(self, routing: Routing) -> Routing:
        assert routing.score_KT is not None
        return rerouted(routing, routing.choices.expert_KT, routing.score_KT > routing.score_KT.mean(), EXPERTS)


class Busy:
    """An early rule by which the rank with most rows gets none.

    Args:
        knows: whether it says what is sent; otherwise the row counts are exchanged after it.
    """

    def __init__(self, knows: bool) -> None:
        self.knows, self.loads_P = knows, torch.zeros(0)

    def notice(self, routing: Routing, slices: TokenSlices) -> Tensor:
        return routing.choices.rows_E.expand(slices.group_size, EXPERTS)

    def decide(self, routing: Routing, slices: TokenSlices, own_PX: Tensor, told_PX: Tensor) -> Decision:
        ranks = slices.group_size
        self.loads_P = told_PX.sum(0).view(ranks, -1).sum(1)
        idle = self.loads_P != self.loads_P.max()
        kept_KT = idle[routing.choices.expert_KT * ranks // EXPERTS]
        sent_PX = own_PX[0].view(ranks, -1) * idle.unsqueeze(1)
        received_PX = told_PX.view(ranks, ranks, -1)[:, slices.rank] * idle[slices.rank]
        routing = rerouted(routing, routing.choices.expert_KT, kept_KT, EXPERTS)
        return Decision(routing, (sent_PX, received_PX) if self.knows else None)


class Curious(nn.Module, OwnExperts):
    """Experts that ask how many tolerant tokens each rank has."""

    notices = 1
    num_local_experts: int

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.inner, self.num_local_experts, self.heard = experts, experts.num_local_experts, torch.zeros(0)

    def notice(self, routing: Routing, ranks: int) -> Tensor:
        assert routing.tolerant_T is not None
        return routing.tolerant_T.sum().expand(ranks, 1)

    def told(self, told_PX: Tensor) -> None:
        self.heard = told_PX.flatten()

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        return run_experts(self.inner, rows_SD, rows_per_expert)


def passes() -> dict[str, Any]:
    """Outputs under rules, by hand and as they are, and collectives of each."""
    torch.manual_seed(1)
    expert = nn.Sequential(nn.Linear(HIDDEN, 16), nn.GELU(), nn.Linear(16, HIDDEN))
    layer = ScMoE(HIDDEN, expert, EXPERTS, dist.get_world_size(), drop_tokens=False, merge="add").double().eval()
    layer.set_deepspeed_parallelism()
    rank = dist.get_rank()
    tokens_TD = torch.randn(TOKENS[rank], HIDDEN, generator=torch.Generator().manual_seed(rank)).double()
    launched: list[int] = []
    launch = Transport.launch

    def counted(self: Transport, *args: Any) -> Any:
        launched[-1] += 1
        return launch(self, *args)

    def run(used: Tensor | None = None) -> Tensor:
        launched.append(0)
        with torch.no_grad():
            return layer(tokens_TD, used)[0]

    Transport.launch = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {"plain": run()}
    layer.routing_rule = Probable()
    found["probable"] = run()
    layer.routing_rule = None
    for knows in (False, True):
        layer.early_rule = rule = Busy(knows)
        found[f"busy {knows}"], found["loads"] = run(), rule.loads_P.tolist()
    layer.deepspeed_moe.experts = curious = Curious(layer.deepspeed_moe.experts)
    used = torch.where(torch.arange(TOKENS[rank]) % 2 == 0, TOLERANT, 1)
    found["busy and curious"], found["heard"] = run(used), curious.heard.tolist()
    layer.early_rule = None
    found["curious"] = run(used)
    layer.train()
    layer.early_rule = Busy(True)
    found["training"] = run(used)
    Transport.launch = launch  # type: ignore[method-assign]
    routed = layer.begin(tokens_TD, used)
    found["experts"] = routed.routing.choices.expert_KT[0].tolist()
    routed.run_experts()
    found["shared"] = layer.finish(routed, tokens_TD)[0] * 0 + layer.shared(tokens_TD)
    return {**found, "launched": launched}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_distributed(passes, 2)


def test_a_rule_without_effect_and_training_change_nothing(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert torch.equal(each["curious"], each["plain"])
        assert torch.equal(each["training"], each["plain"])


def test_rows_of_the_busy_rank_are_left_out(found: list[dict[str, Any]]) -> None:
    chosen = [expert for each in found for expert in each["experts"]]
    loads = [sum(expert // 2 == rank for expert in chosen) for rank in range(2)]
    busy = loads.index(max(loads))
    assert loads[0] != loads[1]
    for each in found:
        assert each["loads"] == loads
        left_out = torch.tensor([expert // 2 == busy for expert in each["experts"]]).unsqueeze(1)
        expected = torch.where(left_out, each["shared"], each["plain"])
        for name in ("busy False", "busy True", "busy and curious"):
            torch.testing.assert_close(each[name], expected, rtol=1e-12, atol=1e-12)


def test_a_routing_rule_leaves_out_what_it_says(found: list[dict[str, Any]]) -> None:
    for each in found:
        same = (each["probable"] - each["plain"]).abs().amax(1) < 1e-12
        shared = (each["probable"] - each["shared"]).abs().amax(1) < 1e-12
        assert (same | shared).all() and same.any() and shared.any()


def test_experts_hear_every_rank(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["heard"] == [(tokens + 1) // 2 for tokens in TOKENS]


def test_a_rule_that_knows_the_counts_costs_no_collective(found: list[dict[str, Any]]) -> None:
    for each in found:
        plain, _, asks, knows, both, curious, training = each["launched"]
        assert asks == plain + 1
        assert knows == both == curious == training == plain
