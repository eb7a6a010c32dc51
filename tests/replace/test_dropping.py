"""Dropped rows of a Hugging Face model's AutoEP layer, against passes in which nothing is left out but weights are 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import scmoe_ds
from lab.distributed import run_distributed
from lab.moe_families import SEQUENCE, tiny
from scmoe_ds.inference.attachment import moe_layers
from scmoe_ds.inference.dropping import attach_dropping
from scmoe_ds.moe.decisions.dropping import criterion
from scmoe_ds.moe.gate import Routing
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.sparse.hugging_face_layers import fused_layers
from scmoe_ds.sparse.sparsity_file import Sparsity, curve_of, digest_of
from tests.replace.test_autoep import config


@dataclass
class Weighed:
    """A routing rule that keeps all rows, and the weights of some."""

    keeps: Callable[[Tensor], Tensor]
    heard: Tensor | None = None
    in_training = False

    def apply(self, routing: Routing) -> Routing:
        self.heard = criterion(routing)
        return replace(routing, weight_KT=routing.weight_KT * self.keeps(self.heard))


@torch.no_grad()
def dropped_and_by_hand(family: str) -> dict[str, Any]:
    model = tiny(family)
    fused = fused_layers(model, family)
    gates, neurons = digest_of(each.gate_ED for each in fused), digest_of(each.input_FD for each in fused)
    engine, *_ = scmoe_ds.initialize(model=model, config=config(2, use_grouped_mm=False))
    model = engine.module.eval()
    (name, layer), *_ = moe_layers(model).items()
    tokens = torch.randn(2, SEQUENCE, layer.hidden_size, generator=torch.Generator().manual_seed(dist.get_rank()))

    def run() -> Tensor:
        output = layer(tokens)
        return (output[0] if isinstance(output, tuple) else output).clone()

    def weighed(keeps: Callable[[Tensor], Tensor]) -> Tensor:
        layer.routing_rule = Weighed(keeps)
        output, layer.routing_rule = run(), None
        return output

    layer.routing_rule = listener = Weighed(torch.ones_like)
    plain, layer.routing_rule = run(), None
    assert listener.heard is not None
    curve = curve_of(name, torch.cat(gather(listener.heard.flatten().clone())), 0.05)
    others = len(moe_layers(model))
    known = {
        "gates": gates,
        "neurons": neurons,
        "top_k": layer.top_k,
        "measure": "abs-gate-up",
        "spread": 0.05,
        "tokens": 1,
    }
    sparsity = Sparsity(layers=(curve,) * others, **known)
    ((skip, halve), *_) = sparsity.thresholds(0.4, "2t")
    whole = weighed(lambda heard: heard >= halve)
    halved = layer.experts.w1.shape[1] // 2
    kept = layer.experts.w2[..., halved:].clone()
    layer.experts.w2[..., halved:] = 0
    major = weighed(lambda heard: (heard >= skip) & (heard < halve))
    layer.experts.w2[..., halved:] = kept
    nothing = weighed(torch.zeros_like)  # what is not routed
    found = {"plain": plain, "by hand": whole + major - nothing}
    dropped = attach_dropping(model, sparsity, 0.4, "2t")
    found["2t"], found["shares"] = run(), dropped.shares()
    with dropped.paused():
        found["paused"] = run()
    dropped.detach()
    dropped = attach_dropping(model, sparsity, 0.4, "2t", load_aware=True)
    found["load-aware"], found["load-aware shares"] = run(), dropped.shares()
    return found


def test_outputs_are_those_by_hand() -> None:
    for found in run_distributed(dropped_and_by_hand, 2, "qwen2_moe"):
        torch.testing.assert_close(found["2t"], found["by hand"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found["2t"], found["plain"], rtol=1e-4, atol=1e-4)
        assert torch.equal(found["paused"], found["plain"])
        assert abs(found["shares"].dropped - 0.4) < 0.02 and found["shares"].halved > 0
        assert abs(found["load-aware shares"].dropped - 0.4) < 0.06
        assert found["load-aware"].isfinite().all()
