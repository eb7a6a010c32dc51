"""The page and the figure of dropped rows, and a gate as skewed as wanted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.harness.skewed_gates import Shares, even_but_first, first_expert, first_rank, skew_gates
from benchmarks.harness.variants import Shape, build
from benchmarks.serving import drop_page
from benchmarks.serving.drop import LAYERS, ROWS
from benchmarks.serving.drop_page import NONE, ONE, TWO, figure, markdown
from benchmarks.serving.dropped_pair import Listener
from scmoe_ds.engine import connect

SPEED = {"median": 1.25, "p10": 1.2, "p90": 1.3}


def row(name: str, drops: Any, rate: float = 0.25) -> dict[str, Any]:
    dropped = 0.0 if drops is None else rate
    shares = None if drops is None else {"dropped": dropped, "skipped": dropped, "halved": 0.0}
    times = {f"{part}_ms": 100 * (1 - dropped) for part in ("layer", "step")}
    limit = {"computation": 1 / (1 - dropped), "bytes": 1.0}
    return {"row": name, "shares": shares, "limit": limit, **times, "layer_speedup": SPEED, "step_speedup": SPEED}


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"busiest_expert_over_mean": 1.8, "rank_load_over_mean": [1.2, 0.8], "spread": 0.1, "rows": rows}


GATES = {"even": "even", "expert 1.8": "expert", "rank 1.8": "rank"}
RECORD: dict[str, Any] = {
    "benchmark": "benchmarks.serving.drop",
    "command": "python -m benchmarks.serving.drop",
    "environment": {"device": "a processor"},
    "settings": {"share": 0.6, "rate": 0.25, "rounds": 30, "method": "send_receive"},
    "shape": "small",
    "link": {"rate_mbit": 100.0, "share": 0.6, "all_to_all_ms": 60.0, "layer_ms": 100.0},
    "layers": {
        "ScMoE": {gate: table([row(*each) for each in ROWS[kind].items()]) for gate, kind in GATES.items()},
    },
    "curve": {"layer": "ScMoE", "skew": 1.8, **table([row(NONE, None), row(f"{ONE}, 0.4", ROWS["even"][ONE], 0.4)])},
}


def test_page_and_figure() -> None:
    text = markdown(RECORD)
    for title in ("even loads, nearly", "busiest expert 1.8 × the mean", "busier rank 1.8 × the mean"):
        assert f"## ScMoE, {title}, rate 0.25" in text
    cells = ["1.25", "1.25", "–", "–", "1.25", "1.25"]
    assert " | ".join(["| ScMoE", "busier rank 1.8 × the mean", "1.20 and 0.80", *cells, ""]).rstrip() in text
    assert f"| {TWO} | 25.0% | 25.0% | 0.0% | 1.33 | 1.00 | 75.0 | 1.250 (1.200–1.300) |" in text
    assert "the limit by computation would be 1.60." in text  # 1.2 / 0.75: then both ranks have 0.75
    sheet = figure(RECORD)
    upper, lower = sheet.subfigs
    bars = upper.axes[0].patches
    assert [bar.get_height() for bar in bars] == [1.25] * 12
    assert [sum(abs(bar.get_center()[0] - place) < 0.5 for bar in bars) for place in range(3)] == [4, 4, 4]
    assert [each.get_text() for each in upper.legends[0].get_texts()] == list(drop_page.DRAWN)
    assert list(lower.axes[0].lines[0].get_ydata()) == pytest.approx([1.0, 0.6])


@pytest.mark.parametrize("layer", LAYERS)
def test_a_gate_gets_the_loads_that_are_wanted(layer: str) -> None:
    connect()
    hidden = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(1))
    pair: Any = build(LAYERS[layer], Shape("small", 16, 2, 4, 64, 16, 2.0), 0.0)
    pair.eval().requires_grad_(False)

    def loads(shares: Shares) -> Any:
        """Over the mean."""
        skew_gates([pair], partial(pair, hidden), shares)
        with torch.no_grad():
            counts = pair(hidden).exp_counts.double()
        return counts / counts.mean()

    assert float(loads(first_expert(3.0, 16))[0]) == pytest.approx(3.0, abs=0.1)
    assert loads(even_but_first(4.0, 16)).tolist() == pytest.approx([4.0] + [0.8] * 15, abs=0.15)
    assert loads(first_rank(1.8, 16, 2)).tolist() == pytest.approx([1.8] * 8 + [0.2] * 8, abs=0.15)
    pair.layer.routing_rule = listener = Listener()
    with torch.no_grad():
        pair(hidden)
    assert len(listener.heard) == 256 * pair.layer.top_k
