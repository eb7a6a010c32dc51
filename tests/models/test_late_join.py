"""Late join: pairs in a row against the equation written out in fp64, and what a model with it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.overlap.executor import PairOutput, backbone
from scmoe_ds.overlap.schedule import Schedule
from tests.helpers import reference

HEADS, HIDDEN, BATCH, SEQUENCE, EXPERTS = 4, 16, 2, 6, 4
GATE = dict(k=1, capacity_factor=1.0, min_capacity=1, drop=False)


def build(num_layers: int, settings: dict[str, Any] | None = None, **section: Any) -> GPT:
    config = ScMoEConfig(num_experts=EXPERTS, drop_tokens=False, join="late", **section)
    model = GPT(GPTSettings(num_layers, HIDDEN, HEADS, 64, SEQUENCE, **(settings or {})), config)
    initialize_parameters(model, 3, 0.4, 1)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # zero biases and unit norms would hide a missing one
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def through_pairs(model: GPT, hidden: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    late: list[Any] = []
    losses = []
    for pair in model.runs:
        output: PairOutput = pair(hidden, used_token, *late)
        hidden, late = output.hidden, [] if output.late is None else [output.late]
        losses.append(output.l_aux)
    assert not late, "the last pair's output joins at its end"
    return hidden, losses


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "pos1": (2, {"position": "pos1", "merge": "add"}, {"tap": 2, "merge": "add"}),
    "pos2": (2, {"position": "pos2", "merge": "cg1"}, {"tap": 1, "merge": "cg1"}),
    "pos3": (2, {"position": "pos3", "merge": "cg2"}, {"tap": 0, "merge": "cg2"}),
    "every block": (1, {"position": "pos1", "moe_every": 1, "merge": "cg2"}, {"tap": 0, "merge": "cg2"}),
    "every fourth": (4, {"moe_every": 4, "shortcut_distance": 2, "merge": "add"}, {"tap": 3}),
    "two experts": (2, {"top_k": 2, "merge": "add"}, {"tap": 1, "gate": {**GATE, "k": 2}}),
    "post norm": (2, {"post_norm": True, "merge": "cg2"}, {"tap": 1, "merge": "cg2"}),
    "shared norm": (
        2,
        {"position": "pos3", "shortcut_norm": "shared"},
        {"tap": 0, "merge": "cg1", "shared_norm": True},
    ),
    "shared norm, pos2": (2, {"shortcut_norm": "shared"}, {"tap": 1, "merge": "cg1", "shared_norm": True}),
    "top-k": (2, {"architecture": "pipelined_topk"}, {"tap": None, "shared": False, "gate": {**GATE, "k": 2}}),
    "shared expert": (2, {"architecture": "overlapped_shared_expert"}, {"tap": None, "merge": "cg2"}),
    "dgmoe": (2, {"architecture": "dgmoe"}, {"tap": 1, "double": True, "shared": False}),
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_pairs_equal_the_equation(case: str, scale: float) -> None:
    """Output and gradients of three pairs: the first has nothing to join, the last joins at its end."""
    blocks, section, arguments = CASES[case]
    model = build(3 * blocks, {"residual_scale": scale}, **section)
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gate, used = dict(arguments.get("gate", GATE)), None
    if case == "pos2":  # and with padding
        used = torch.arange(SEQUENCE) < torch.tensor([[SEQUENCE], [3]])
        gate["used"] = used.flatten().tolist()
    names, parameters = zip(*model.runs.named_parameters(), strict=True)
    weights = {name: each.detach().clone().requires_grad_() for name, each in zip(names, parameters, strict=True)}
    found, losses = through_pairs(model, hidden, used)
    rest = {"pairs": 3, "blocks": blocks, "heads": HEADS, "scale": scale, **arguments, "gate": gate}
    target, expected_losses = reference.late_joining(hidden, weights, **rest)
    assert (found - target).abs().max() <= 1e-6 * target.abs().max(), "the gate computes in fp32"
    grads = torch.autograd.grad((found * direction).sum() + 0.7 * sum(losses), parameters)
    expected = torch.autograd.grad(
        (target * direction).sum() + 0.7 * sum(expected_losses),
        list(weights.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    largest = max(each.abs().max() for each in expected)
    for name, grad, wanted in zip(names, grads, expected, strict=True):
        assert (grad - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-2 * largest), name


@pytest.mark.parametrize("section", [{"position": "pos3"}, {"position": "pos1", "moe_every": 1}])
def test_every_slot_gives_the_same_bits(section: dict[str, Any]) -> None:
    """Dropout and the gate draw the same numbers, because all computation stays in one order."""
    model = build(4, {"hidden_dropout": 0.1}, **section)
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64)
    results = []
    for slot in range(1, len(backbone(model.scheduled_pairs()[0])) + 2):
        for pair in model.scheduled_pairs():
            pair.schedule = Schedule(slot)
        torch.manual_seed(0)
        results.append(through_pairs(model, hidden)[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_dropout_is_on_each_part_as_it_joins() -> None:
    model = build(2, {"hidden_dropout": 0.5}, merge="add")
    pair = model.runs[0]
    pair.layer.mlp.output.weight.data.zero_()
    pair.layer.mlp.output.bias.data.zero_()
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64)
    torch.manual_seed(0)
    trained = pair(hidden).hidden
    torch.manual_seed(0)
    pair.joins_late = False
    assert not torch.equal(trained, pair(hidden).hidden), "the shared part has drawn numbers of its own"


@pytest.mark.parametrize(
    ("section", "window"),
    [
        ({"position": "pos1"}, (("attention before tap",), False)),
        ({"position": "pos2"}, (("attention before tap",), False)),
        ({"position": "pos3"}, (("attention",), True)),
        ({"position": "pos2", "first_layer_position": "pos3"}, (("attention",), False)),
        ({"position": "pos1", "moe_every": 1}, (("attention",), True)),
        ({"architecture": "pipelined_topk"}, (("attention before tap",), False)),
    ],
)
def test_beside_what_a_combine_goes_on(section: dict[str, Any], window: tuple[Any, bool]) -> None:
    first, *_, last = build(4, **section).scheduled_pairs()
    assert first.late_window == window and last.late_window is None
    assert first.facts() != last.facts(), "they have other times, and other schedules"


def test_the_first_slot_counts_the_next_attention() -> None:
    """Of mlp 2, attention 1, shared 2 and the next attention 1, the half lies between attention and shared."""
    settings = {"ffn_hidden_size": HIDDEN * 3}
    slots = [pair.schedule.slots for pair in build(4, settings).scheduled_pairs()]
    assert slots == [(3,), (2,)]


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"norm_placement": "post"}, {}, "--norm-placement post"),
        ({}, {"recompute": "full"}, "--recompute-granularity full"),
    ],
)
def test_models_that_cannot_join_late(settings: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    config = ScMoEConfig(join="late")
    with pytest.raises(ScMoEConfigError, match=f'scmoe.join = "late": .*{words}.*; use .*, or set scmoe.join to end'):
        GPT(GPTSettings(2, HIDDEN, HEADS, 64, SEQUENCE, **settings), config, **arguments)


@pytest.mark.parametrize("architecture", ["topk", "shared_expert"])
def test_deepspeeds_layers_join_at_the_end(architecture: str) -> None:
    with pytest.raises(ScMoEConfigError, match="DeepSpeed's own layers run in one piece"):
        ScMoEConfig(architecture=architecture, join="late")


def test_selective_recompute_gives_the_same_bits() -> None:
    plain, again = build(4, merge="cg2"), build(4, merge="cg2")
    for pair in again.runs:
        pair.recompute = "selective"
    results = []
    for model in (plain, again):
        hidden = torch.ones(BATCH, SEQUENCE, HIDDEN, dtype=torch.float64, requires_grad=True)
        found, _ = through_pairs(model, hidden)
        results.append([found, *torch.autograd.grad(found.square().sum(), [hidden, *model.runs.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
