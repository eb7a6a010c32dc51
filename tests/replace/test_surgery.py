"""Starting weights of what a conversion adds: the numbers that `replace.surgery` names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from scmoe_ds.config.names import Merge
from scmoe_ds.moe.merge import merge_weights
from scmoe_ds.replace.modeling_adapted import SharedExpert, ShortcutParts
from scmoe_ds.replace.surgery import mean_of, start_parts

E, D, F = 3, 8, 4


def swiglu(tokens: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (tokens @ gate_up.t()).split(F, dim=-1)
    return nn.functional.silu(gate) * up @ down.t()


@pytest.mark.parametrize(
    ("merge", "added", "weights"),
    [
        ("cg1", False, (0.95, 1)),
        ("cg2", False, (0.5, 0.5)),
        ("cg1", True, (0.05, 1)),
        ("cg2", True, (0.05, 0.95)),
        ("add", True, (0.05, 1)),
    ],
)
def test_the_first_weights_of_shared_and_routed(merge: Merge, added: bool, weights: tuple[float, float]) -> None:
    coefficient = None if merge == "add" else nn.Linear(D, {"cg1": 1, "cg2": 2}[merge])
    parts = ShortcutParts(None, SharedExpert(D, F, "silu") if added else None, coefficient)
    expert, tokens = (torch.randn(2 * F, D), torch.randn(D, F)), torch.randn(5, D)
    start_parts(parts, merge, lambda: expert)
    of_shared, of_routed = merge_weights(merge, tokens, coefficient)
    shared = torch.ones(5, D)
    if parts.shared_expert is not None:
        shared = parts.shared_expert(tokens) / swiglu(tokens, *expert)
    if of_shared is not None:
        shared = shared * of_shared
    torch.testing.assert_close(shared, torch.full((5, D), float(weights[0])), rtol=1e-3, atol=1e-5)
    assert weights[1] == pytest.approx(1.0 if of_routed is None else float(of_routed.detach().mean()))


def test_the_mean_of_experts_that_several_ranks_hold() -> None:
    experts = torch.randn(E, 2 * F, D).bfloat16()
    total = experts.float().sum(0) * 2  # of two ranks with expert 0 and two ranks with the others
    for own in (experts[:1], experts[1:]):
        found = mean_of(own, lambda own: total, of=2 * E)
        torch.testing.assert_close(found, experts.float().mean(0))
    assert torch.equal(mean_of(experts), experts.sum(0, dtype=torch.float32) / E)
