"""Which ranks are hot, by hand on two ranks, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lab.distributed import run_distributed
from scmoe_ds import ScMoE
from scmoe_ds.comm.transport import Transport
from scmoe_ds.inference.low_precision import use_low_precision
from scmoe_ds.models.layers import MLP
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from scmoe_ds.moe.gate import TOLERANT
from tests.helpers.settings import GPT2

EXPERTS, TOKENS, PADDED = 4, (24, 36), 4
SETTINGS: dict[str, dict[str, Any]] = {
    "score": {"score": 0.6, "share": 0.5},
    "higher share": {"score": 0.6, "share": 0.99},
    "marked": {"share": 0.4},
    "no marks": {"share": 0.01},
    "higher overload": {"score": 0.6, "share": 0.5, "overload": 1.9},
    "few tokens": {"score": 0.6, "share": 0.5, "min_tokens": sum(TOKENS) - 2 * PADDED},
    "all": {"ranks": "all"},
    "all, few tokens": {"ranks": "all", "min_tokens": sum(TOKENS) - 2 * PADDED},
}


def passes(k: int) -> dict[str, Any]:
    """The routing, and for each setting whether this rank was hot, its output and the collectives."""
    torch.manual_seed(1)
    layer = ScMoE(32, MLP(GPT2), EXPERTS, dist.get_world_size(), k, drop_tokens=False, top2_2nd_expert_sampling=False)
    layer.eval().set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight.data[0] += 0.05  # rank 0 has more rows
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    tokens_TD = torch.randn(TOKENS[rank], 32, generator=generator) + 0.3
    used_T = torch.where(torch.rand(TOKENS[rank], generator=generator) < 0.6, TOLERANT, 1)
    used_T[:PADDED] = 0
    launched: list[int] = []
    launch = Transport.launch

    def counted(self: Transport, *args: Any) -> Any:
        launched[-1] += 1
        return launch(self, *args)

    @torch.no_grad()
    def run(used: Tensor | None) -> Tensor:
        launched.append(0)
        return layer(tokens_TD, used)[0]

    Transport.launch = counted  # type: ignore[method-assign]
    found: dict[str, Any] = {"plain": run(used_T), "tolerant": (used_T == TOLERANT).tolist()}
    for name, changes in SETTINGS.items():
        attached = use_low_precision(layer, LowPrecision(**{"score": None, "min_tokens": 0, **changes}))
        output = run((used_T != 0) if name == "no marks" else used_T)
        counts = attached.layers[0].counts
        assert counts.passes == 1
        found[name] = counts.hot == 1, output
        attached.detach()
    found["summary"] = attached.summary()
    Transport.launch = launch  # type: ignore[method-assign]
    attached.attach()
    with torch.enable_grad():
        layer(tokens_TD, used_T)
    found["with gradients"] = counts.passes - counts.hot
    probability_TE = torch.softmax(layer.deepspeed_moe.gate.wg(tokens_TD), dim=1)[PADDED:]
    return {**found, "probability": probability_TE.tolist(), "launched": launched}


def both() -> dict[int, dict[str, Any]]:
    return {k: passes(k) for k in (1, 2)}


@pytest.fixture(scope="module")
def of_both() -> list[dict[int, dict[str, Any]]]:
    return run_distributed(both, 2)


@pytest.fixture(params=[1, 2], ids=["top-1", "top-2"])
def found(request: pytest.FixtureRequest, of_both: list[dict[int, dict[str, Any]]]) -> tuple[int, list[dict[str, Any]]]:
    return request.param, [each[request.param] for each in of_both]


def by_hand(k: int, ranks: list[dict[str, Any]], marked: bool) -> list[tuple[int, float]]:
    """Rows of each rank, and the share of tolerant ones."""
    rows: list[list[bool]] = [[], []]
    for each in ranks:
        for probability_E, tolerant in zip(each["probability"], each["tolerant"][PADDED:], strict=True):
            chosen = sorted(range(EXPERTS), key=lambda expert: -probability_E[expert])[:k]
            total = sum(probability_E[expert] for expert in chosen) if k > 1 else 1.0
            for expert in chosen:
                low = probability_E[expert] / total < 0.6
                rows[expert // 2].append(tolerant if marked else low)
    return [(len(of_rank), sum(of_rank) / len(of_rank)) for of_rank in rows]


def test_hot_ranks_by_hand(found: tuple[int, list[dict[str, Any]]]) -> None:
    k, ranks = found
    loads = [load for load, _ in by_hand(k, ranks, False)]
    assert loads[0] > 1.05 * sum(loads) / 2
    for name, changes in SETTINGS.items():
        if "few tokens" in name or name == "no marks":
            expected = [False, False]
        elif name == "all":
            expected = [True, True]
        else:
            shares = [share for _, share in by_hand(k, ranks, name == "marked")]
            overload = changes.get("overload", 1.05)
            expected = [
                load > overload * sum(loads) / 2 and share >= changes["share"]
                for load, share in zip(loads, shares, strict=True)
            ]
        assert [each[name][0] for each in ranks] == expected, name
    assert [each["score"][0] for each in ranks] == [True, False]  # the settings above tell something
    assert [each["marked"][0] for each in ranks] == [True, False]
    assert not any(each["higher share"][0] or each["higher overload"][0] for each in ranks)


def test_outputs(found: tuple[int, list[dict[str, Any]]]) -> None:
    """Bit-equal where no rank is hot, and close where one is: its experts' error is that of int8."""
    _, ranks = found
    for name in SETTINGS:
        hot = any(each[name][0] for each in ranks)
        for each in ranks:
            if not hot:
                assert torch.equal(each[name][1], each["plain"])
            else:
                error = float((each[name][1] - each["plain"]).norm() / each["plain"].norm())
                assert 0 < error < 0.02


def test_no_collective_more_and_none_hot_with_gradients(found: tuple[int, list[dict[str, Any]]]) -> None:
    for each in found[1]:
        assert len(set(each["launched"])) == 1
        assert each["with gradients"] == 2  # of "all, few tokens", and under gradients
        assert each["summary"].startswith("low precision (int8): hot ranks, of 1 layer passes: none")
