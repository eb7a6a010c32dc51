"""benchmarks.quality.low_precision: gates as skewed as they are said to be, loads by kind, and the page."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.harness.skewed_gates import count_loads, first_expert, over_ranks, skew_gates
from benchmarks.quality.low_precision import COARSE, FourBits, row_settings
from benchmarks.quality.low_precision_page import markdown
from scmoe_ds.engine import connect
from scmoe_ds.models.vision_language import VisionLanguageGPT
from scmoe_ds.moe.decisions.low_precision import LowPrecision
from tests.models.test_vision_language import IMAGES, KINDS, TOKENS, USED, built

ROWS = 40
TEXT = torch.randint(63, (ROWS, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> VisionLanguageGPT:
    connect()
    model = built().eval().requires_grad_(False)
    for number, pair in enumerate(model.scheduled_pairs()):
        torch.nn.init.normal_(pair.shortcut_norm.bias, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("skew", [1.8, 3.2])
def test_every_gate_gets_the_skew(model: VisionLanguageGPT, skew: float) -> None:
    run = partial(model, TEXT)
    pairs = model.scheduled_pairs()
    skew_gates(pairs, run, first_expert(skew, pairs[0].layer.num_experts))
    for loads in count_loads(model, run, LowPrecision(score=None)):
        assert float(loads.rows_2E[0, 0] / loads.rows_2E[0].mean()) == pytest.approx(skew, rel=0.01)
        assert not loads.rows_2E[1].any() and int(loads.rows_2E[0].sum()) == TEXT.numel()


def test_a_gate_without_a_norm_with_bias_is_refused(model: VisionLanguageGPT) -> None:
    pair, run = model.scheduled_pairs()[0], partial(model, TEXT)
    usual, pair.shortcut_norm = pair.shortcut_norm, torch.nn.RMSNorm(pair.shortcut_norm.bias.numel())
    with pytest.raises(ValueError, match="take a norm with a bias"):
        skew_gates([pair], run, first_expert(1.8, 4))
    pair.shortcut_norm = torch.nn.Sequential(torch.nn.LayerNorm(usual.bias.numel()), torch.nn.Tanh())
    pair.shortcut_norm.bias, pair.shortcut_norm.weight = usual.bias, usual.weight
    with pytest.raises(ValueError, match="straight from the norm"):
        skew_gates([pair], run, first_expert(1.8, 4))


def test_rows_are_counted_by_kind(model: VisionLanguageGPT) -> None:
    plain = model(TOKENS, used_token=USED, images=IMAGES).exp_counts
    found = count_loads(model, partial(model, TOKENS, used_token=USED, images=IMAGES), LowPrecision(score=None))
    for loads, counts in zip(found, plain, strict=True):
        assert loads.rows_2E[0].tolist() == counts.tolist()
        assert int(loads.rows_2E[1].sum()) == int((KINDS == 2).sum())
        of_two = over_ranks(loads, 2)
        assert of_two["load"][0] == pytest.approx(float(counts[:2].sum() / counts.sum() * 2))
        assert of_two["tolerant"][1] == pytest.approx(float(loads.rows_2E[1, 2:].sum() / counts[2:].sum()))
    assert all(pair.layer.routing_rule is None for pair in model.scheduled_pairs())


def test_four_bits() -> None:
    matrix = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    found = FourBits().scaled(matrix)
    assert int(found.values.abs().max()) == 7
    assert ((found.values * found.scale_R1 - matrix).abs() <= found.scale_R1 / 2 + 1e-6).all()


def test_the_page() -> None:
    names = list(row_settings(None))
    rows = [{"row": name, "loss": [2.0, 4.0], "hot": [], "right": 0.5} for name in names]
    rows[2] = {**rows[2], "loss": [2.02, 4.0], "hot": [[1.0, 0.5], [0.0, 0.0]]}
    ranks = {
        "2": {"load": [1.5, 0.5], "tolerant": [0.8, 0.3]},
        "4": {"load": [0.5, 2.0, 1, 0.5], "tolerant": [0.1] * 4},
    }
    layer = {"busiest_expert": 4.0, "busiest_of_kind": [5.0, 1.0], "tolerant": 0.7, "ranks": ranks}
    models = [{"title": "One", "score": 0.25, "skews": [{"skew": 4.0, "rows": rows, "layers": [layer, layer]}]}]
    page = markdown({"command": "python x", "environment": {"device": "d"}, "groups": 2, "models": models})
    assert "choices with a score below 0.250" in page
    assert "| first expert 4 × | 4.00 | 5.00 | 1.00 | 70 % | 1.50, 80 % | 2.00, 10 % |" in page
    assert f"| {names[2]} | 3.0100 | +0.333 % (+0.000 … +1.000) | 50.00 % | 100 / 0 %; 50 / 0 % |" in page
    assert sum(name.startswith(COARSE) for name in names) == (len(names) - 2) / 2
