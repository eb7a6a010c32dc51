"""Dropped rows under expert parallelism: outputs against one rank's, bytes, collectives, levels; AutoEP's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.distributed import run_distributed
from scmoe_ds.comm.transport import Transport
from scmoe_ds.errors import CheckpointError
from scmoe_ds.inference.droppable import digests_of
from scmoe_ds.inference.dropping import Shares, attach_dropping
from scmoe_ds.models.layers import MLP, GPTSettings
from scmoe_ds.moe.decisions.dropping import DropRule, Places, Thresholds, criterion
from scmoe_ds.moe.decisions.halves import HalvedExperts
from scmoe_ds.moe.decisions.load_aware import Levels, LoadAwareRule
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.sparse.sparsity_file import Sparsity, curve_of
from tests.helpers import reference

HIDDEN, EXPERTS, TOKENS, RANKS = 8, 8, (30, 50), 2
LOCAL, CPU = EXPERTS // RANKS, torch.device("cpu")
LEVELS = 8
KINDS = ("none", "1t", "2t", "1t load-aware", "2t load-aware")


def layer_of(k: int) -> StagedMoE:
    torch.manual_seed(k)
    settings = GPTSettings(1, HIDDEN, 1, 8, 8, ffn_hidden_size=12, swiglu=k == 2)
    layer = StagedMoE(
        HIDDEN, MLP(settings), EXPERTS, RANKS, k, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False
    )
    torch.nn.init.normal_(layer.deepspeed_moe.gate.wg.weight)
    layer.set_deepspeed_parallelism()
    return layer.double().eval()


def thresholds_of(k: int, kind: str) -> Thresholds:
    T = {1: 0.7, 2: 0.4, 4: 0.2}[k]
    return Thresholds(T, T) if kind.startswith("1t") else Thresholds(T * 0.8, T * 1.2)


def levels_of(k: int, kind: str) -> Levels:
    """Up to these thresholds, each of which is said to leave out as much as it is of them."""
    parts, highest = [number / (LEVELS - 1) for number in range(LEVELS)], thresholds_of(k, kind)
    return Levels(
        [Thresholds(highest.skip * part, highest.halve * part) for part in parts], {1: 0.2, 2: 0.2, 4: 0.55}[k]
    )


def passes(k: int) -> dict[str, Any]:
    """Of each kind of dropping: outputs, bytes, collectives, what was counted, and levels."""
    rank, found = dist.get_rank(), {}
    tokens_TD = torch.randn(TOKENS[rank], HIDDEN, generator=torch.Generator().manual_seed(rank)).double()
    launched: list[list[int]] = []
    launch = Transport.launch

    def counted(self: Transport, received: Tensor, rows: Tensor, *args: Any) -> Any:
        launched[-1].append(rows.numel() * rows.element_size())
        return launch(self, received, rows, *args)

    Transport.launch = counted  # type: ignore[method-assign]
    try:
        for kind in KINDS:
            layer = layer_of(k)
            tokens_TD += (
                0.4 * layer.deepspeed_moe.gate.wg.weight.detach()[:LOCAL].sum(0) * (kind == "none")
            )  # rank 0 has more
            places = Places(LOCAL, 1 if kind.startswith("1t") else 2)
            rule: Any = None
            if kind.startswith("2t"):
                layer.deepspeed_moe.experts = HalvedExperts(layer.deepspeed_moe.experts)
            if kind.endswith("load-aware"):
                layer.early_rule = rule = LoadAwareRule(levels_of(k, kind), places, CPU)
            elif kind != "none":
                layer.routing_rule = rule = DropRule(thresholds_of(k, kind), places, CPU)
            launched.append([])
            with torch.no_grad():
                output = layer(tokens_TD)[0]
                routing = route(layer.deepspeed_moe.gate, tokens_TD, facts=True)
            found[kind] = {
                "output": output,
                "bytes": sum(launched[-1]),
                "collectives": len(launched[-1]),
                "counts": None if rule is None else rule.counts.read(),
                "levels": rule.chosen.tolist() if kind.endswith("load-aware") else None,
            }
    finally:
        Transport.launch = launch  # type: ignore[method-assign]
    weights = {name: each.detach().clone() for name, each in layer.named_parameters()}
    experts: list[Any] = [None] * RANKS
    dist.all_gather_object(experts, weights)
    whole = {
        name.replace(f".{local}.", f".{rank * LOCAL + local}."): each
        for rank, part in enumerate(experts)
        for name, each in part.items()
        for local in range(LOCAL)
        if f"experts.{local}." in name
    }
    choices = list(zip(routing.expert_KT.t().tolist(), routing.weight_KT.t().double(), strict=True))
    pairs = [list(zip(chosen, weight, strict=True)) for chosen, weight in choices]
    return {**found, "pairs": pairs, "weights": whole, "tokens": tokens_TD, "criterion": criterion(routing)}


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    by_rank = run_distributed(everything, RANKS)
    return {k: [each[k] for each in by_rank] for k in (1, 2, 4, "attached")}


def everything() -> dict[Any, Any]:
    return {**{k: passes(k) for k in (1, 2, 4)}, "attached": attached()}


def attached() -> tuple[Shares, Shares, Shares]:
    """What a model with load-aware thresholds has left out, what it leaves out while paused, and with equal ones."""
    shares = []
    tokens_TD = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank())).double()
    curve = curve_of("moe", torch.linspace(0.02, 0.8, 100), 0.1)  # T - 0.1 is below 0 at low rates
    gates, neurons = digests_of([layer_of(2)])
    assert (neurons is None) == (dist.get_rank() > 0), "the first expert is rank 0's"
    known = {"gates": gates, "neurons": neurons or "", "top_k": 2, "measure": "abs-gate", "spread": 0.1, "tokens": 50}
    sparsity = Sparsity(**known, layers=(curve,))
    other = sparsity.model_copy(update={"neurons": "those of another order"})
    with pytest.raises(
        CheckpointError, match=r"the model: sparsity\.json is of another checkpoint, whose experts have"
    ):
        attach_dropping(nn.ModuleDict({"moe": layer_of(2)}), other, 0.4, "2t")
    for load_aware in (True, False):
        layer = layer_of(2)
        skewed_TD = tokens_TD + 0.5 * layer.deepspeed_moe.gate.wg.weight.detach()[0]
        dropped = attach_dropping(nn.ModuleDict({"moe": layer}), sparsity, 0.4, "2t", load_aware)
        with torch.no_grad():
            layer(skewed_TD)
            shares.append(dropped.shares())
            if load_aware:
                dropped.reset()
                with dropped.paused():
                    layer(skewed_TD)
                shares.append(dropped.shares())
    return shares[0], shares[1], shares[2]


def expected_of(each: dict[str, Any], k: int, kind: str, levels: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    """By hand, with the thresholds of the rank that holds each expert."""
    output, counts = 0, torch.zeros(3, dtype=torch.int64)
    for rank, level in enumerate(levels):
        highest = thresholds_of(k, kind)
        factor = level / (LEVELS - 1)
        # The other ranks' experts weigh nothing, but count in the sum of a token's scores.
        weights = {
            name: torch.zeros_like(tensor)
            if ".output." in name and int(name.split(".")[3]) // LOCAL != rank
            else tensor
            for name, tensor in each["weights"].items()
        }
        part, _ = reference.dropped(
            each["tokens"],
            weights,
            "deepspeed_moe",
            each["pairs"],
            highest.skip * factor,
            highest.halve * factor,
            k == 2,
        )
        output = output + part
        for t, chosen in enumerate(each["pairs"]):
            for number, (e, _) in enumerate(chosen):
                score = float(each["criterion"][number, t])
                if e // LOCAL == rank:
                    counts[0] += 1
                    if score >= highest.skip * factor:
                        counts[1 if score >= highest.halve * factor else 2] += 1
    return output, tuple(counts.tolist())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_outputs_and_counts_are_those_of_the_reference(found: dict[int, list[dict[str, Any]]], k: int) -> None:
    for each in found[k]:
        for kind in KINDS[1:]:
            levels = each[kind]["levels"] or [LEVELS - 1] * RANKS
            output, counts = expected_of(each, k, kind, levels)
            torch.testing.assert_close(each[kind]["output"], output, rtol=1e-6, atol=1e-6)
            assert each[kind]["counts"] == counts


@pytest.mark.parametrize("k", [1, 2, 4])
def test_levels_are_those_of_the_loads_on_all_ranks(found: dict[int, list[dict[str, Any]]], k: int) -> None:
    """By hand, from the criteria of all ranks."""
    for kind in ("1t load-aware", "2t load-aware"):
        criteria: list[list[float]] = [[] for _ in range(RANKS)]
        for each in found[k]:
            for t, chosen in enumerate(each["pairs"]):
                for number, (expert, _) in enumerate(chosen):
                    criteria[expert // LOCAL].append(float(each["criterion"][number, t]))
        levels = levels_of(k, kind)
        left_out = [
            [sum((score < each.skip) + (score < each.halve) for score in of_rank) for each in levels.thresholds]
            for of_rank in criteria
        ]
        loads = torch.tensor([len(of_rank) for of_rank in criteria])
        expected = levels.of_ranks(loads, torch.tensor(left_out)).tolist()
        assert loads[0] > loads[1] and expected[0] > expected[1]
        for each in found[k]:
            assert each[kind]["levels"] == expected


@pytest.mark.parametrize("k", [1, 2, 4])
def test_fewer_bytes_and_no_more_collectives(found: dict[int, list[dict[str, Any]]], k: int) -> None:
    for each in found[k]:
        plain = each["none"]
        for kind in KINDS[1:]:
            assert each[kind]["collectives"] == plain["collectives"]
    # Beside rows, a notice of 8 levels, and what all know of all ranks, takes the place of the row counts.
    of_counts = {kind: 8 * RANKS * numbers(kind, k) for kind in KINDS}
    rows = {kind: sum(each[kind]["bytes"] - of_counts[kind] for each in found[k]) for kind in KINDS}
    assert rows["1t"] < rows["1t load-aware"] < rows["none"]
    assert rows["2t"] < rows["2t load-aware"] < rows["none"]


def numbers(kind: str, k: int) -> int:
    """That each rank tells each."""
    one_level = LOCAL * (2 if kind.startswith("2t") else 1) + (k > 1)
    return LEVELS * one_level + RANKS * (1 + LEVELS) if kind.endswith("load-aware") else one_level


def test_what_was_left_out_is_told_alike_on_all_ranks(found: dict[Any, list[Any]]) -> None:
    (load_aware, paused, plain), other = found["attached"]
    assert (load_aware, paused, plain) == other
    assert load_aware.halved > 0 and plain.dropped > 0
    # 120 tokens on both ranks, and levels at which one rank leaves 7 % more out than at the one before.
    assert load_aware.dropped == pytest.approx(0.4, abs=0.05)
    assert paused.dropped == 0
