"""`scmoe plan --fit` names the figure, in sentences, and refuses steps of something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scmoe_ds.errors import PlanError
from scmoe_ds.programs.plan_fit import fit_lines
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import AUTOEP, Method
from scmoe_ds.simulate.model import Experts, Model, Stage
from tests.simulate.clusters import cluster

CLUSTER = cluster(nodes=2, gpus_per_node=4)
LAYOUT = Layout(8, expert_parallel=4, micro_batch=2, accumulation=4)
EXPERTS = Experts(num_experts=4, hidden=64, top_k=2)
MODEL = Model(
    name="tiny",
    stages=(
        Stage(
            layers=2,
            hidden=16,
            tokens=100,
            span=100,
            heads=2,
            kv_heads=2,
            head_dim=8,
            mlp_hidden=64,
            moe_layers=(1,),
            experts=EXPERTS,
        ),
    ),
    vocabulary=100,
)


def parts_of(described: Cluster, method: Method, layout: Layout) -> dict[str, float]:
    """Compute and the link, more of it with AutoEP."""
    exposed = (
        layout.accumulation * layout.micro_batch * (2.0 if method == AUTOEP else 1.0) * 1e9 / described.inside.rate
    )
    compute = layout.accumulation * layout.micro_batch * 1e12 / described.gpu.peak["bf16"]
    return {"total": 1e3 * (compute + exposed), "exposed": 1e3 * exposed}


def fitted(tmp_path: Path, *rows: dict, described: Cluster = CLUSTER) -> str:
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(rows))
    return "\n".join(fit_lines(path, MODEL, Method("own", "topk"), LAYOUT, described, parts_of))


def test_a_slow_link_is_named_with_what_it_would_have_to_be(tmp_path: Path) -> None:
    slow = cluster(nodes=2, gpus_per_node=4, inside={"rate": 4e10})
    plain, autoep = parts_of(slow, Method("own", "topk"), LAYOUT), parts_of(slow, AUTOEP, LAYOUT)
    text = fitted(tmp_path, {"step_ms": plain["total"]}, {"step_ms": autoep["total"], "method": "AutoEP"})
    assert "Wrong is most likely inside.rate, link inside a node: 100 GB/s in the description, " in text
    assert "39.9 GB/s (× 0.4" in text or "40 GB/s (× 0.4" in text or "40.1 GB/s (× 0.4" in text
    assert (
        "Without effect on these steps: gpu.bandwidth, gpu.launch, between.nic_rate, between.latency, optimizer."
        in text
    )


def test_other_sentences(tmp_path: Path) -> None:
    right = parts_of(CLUSTER, AUTOEP, LAYOUT)
    assert "No figure needs to change" in fitted(tmp_path, {"step_ms": right["total"], "method": "AutoEP"})
    text = fitted(tmp_path, {"step_ms": 3 * right["total"]})
    assert "cannot tell apart" in text and "gpu.peak" in text and "inside.rate" in text
    fast = fitted(tmp_path, {"step_ms": 0.6 * right["total"], "exposed_ms": right["exposed"] / 2})
    assert "no kernel would be that fast" in fast
    odd = fitted(tmp_path, {"step_ms": 2 * right["total"]}, {"step_ms": right["total"] / 3})
    assert "No single figure explains them" in odd


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"world": 16}, "16 ranks: the cluster has 8 GPUs"),
        ({"expert_parallel": 3}, "EP × TP = 3: must divide the 8 ranks"),
        ({"method": "AutoEPP"}, "method = AutoEPP: must be one of 'own', "),
    ],
)
def test_steps_of_something_else(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        fitted(tmp_path, {"step_ms": 5.0, **row})


def test_a_log_of_another_model(tmp_path: Path) -> None:
    start = {"kind": "start", "iteration": 0, "shape": {"num_layers": 2, "hidden_size": 32}, "experts": [4], "ranks": 8}
    steps = [{"kind": "step", "iteration": 10 * n, "seconds_per_iteration": 1.0} for n in range(1, 4)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [start, *steps])))
    with pytest.raises(PlanError, match="hidden_size = 32: these are steps of another model, tiny has 16"):
        fit_lines(tmp_path, MODEL, AUTOEP, LAYOUT, CLUSTER, parts_of)
