"""A pair's output and all of its gradients against plain PyTorch that loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.executor import backbone
from tests.helpers import reference

HEADS, HIDDEN, BATCH, SEQUENCE = 4, 16, 2, 12
SETTINGS = GPTSettings(2, HIDDEN, HEADS, 64, SEQUENCE)


def build_pair(position: str, sequence: int = SEQUENCE, **section: object) -> StagedPair:
    config = ScMoEConfig.from_deepspeed(
        {"scmoe": {"num_experts": 4, "min_capacity": 1, "position": position, **section}}
    )
    pair = make_pair(SETTINGS, config, 4, position, sequence)
    initialize_parameters(pair, 3, 0.4, 1)
    for parameter in pair.parameters():
        if parameter.ndim == 1:  # zero biases and unit norms would hide a missing one
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return pair


def largest_relative_error(found: Tensor, target: Tensor) -> float:
    return ((found - target).abs().max() / target.abs().max().clamp(min=1e-6)).item()


def check(pair: StagedPair, used_token: Tensor | None = None, **reference_arguments: object) -> None:
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    direction = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    found = pair(hidden, used_token)
    names, parameters = zip(*pair.named_parameters(), strict=True)
    grads = torch.autograd.grad((found.hidden * direction).sum() + 0.7 * found.l_aux, [hidden, *parameters])

    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in pair.named_parameters()}
    twin = hidden.detach().clone().requires_grad_()
    target, l_aux = reference.pair(twin, weights, heads=HEADS, **reference_arguments)
    wanted_grads = torch.autograd.grad(
        (target * direction).sum() + 0.7 * l_aux, [twin, *weights.values()], allow_unused=True, materialize_grads=True
    )  # an expert without tokens takes no part in the reference; ours must then give it zeros

    assert largest_relative_error(found.hidden, target) <= 1e-5
    assert abs(found.l_aux - l_aux) <= 1e-5
    largest = max(grad.abs().max() for grad in wanted_grads)
    for name, grad, wanted_grad in zip(["hidden", *names], grads, wanted_grads, strict=True):
        # Gradients that are zero but for rounding (the key bias shifts all scores alike) are measured at the scale of all.
        scale = wanted_grad.abs().max().clamp(min=1e-2 * largest)
        assert ((grad - wanted_grad).abs().max() / scale) <= 1e-5, name


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("merge", ["add", "cg1", "cg2"])
@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
@pytest.mark.parametrize("dispatch", ["exact", "padded"])
def test_pair_equals_reference(dispatch: str, position: str, merge: str, k: int, drop: bool) -> None:
    pair = build_pair(position, merge=merge, top_k=k, drop_tokens=drop, capacity_factor=0.6, dispatch=dispatch)
    torch.manual_seed(0)  # the gate is the first to draw random numbers
    order = torch.rand(BATCH * SEQUENCE, 4) if k == 1 else None
    gate = dict(k=k, capacity_factor=0.6, min_capacity=1, drop=drop, order=order)
    check(pair, position=position, merge=merge, gate=gate)


@pytest.mark.parametrize(("moe_every", "position"), [(1, "pos1"), (4, "pos2")])
def test_other_placements_equal_reference(moe_every: int, position: str) -> None:
    pair = build_pair(position, moe_every=moe_every, drop_tokens=False)
    gate = dict(k=1, capacity_factor=1.0, min_capacity=1, drop=False, order=None)
    check(pair, position=position, merge="cg1", gate=gate, num_blocks=moe_every)


@pytest.mark.parametrize("position", ["pos1", "pos2", "pos3"])
def test_two_pairs_that_share_a_moe_equal_reference(position: str) -> None:
    """DGMoE-Share: the gradients of gate and experts are those of both uses, which choose differently."""
    section = {
        "architecture": "dgmoe",
        "position": position,
        "drop_tokens": False,
        "num_experts": 4,
        "pairs_per_moe": 2,
        "min_capacity": 1,
    }
    model = GPT(GPTSettings(4, HIDDEN, HEADS, 64, SEQUENCE), ScMoEConfig.from_deepspeed({"scmoe": section}))
    initialize_parameters(model, 3, 0.4, 1)
    first, second = model.scheduled_pairs()
    assert first.last.owns_moe and not second.last.owns_moe and first.layer is second.layer
    assert not any(".moe." in name for name, _ in second.named_parameters()), "trained and saved once"
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=torch.Generator().manual_seed(1))
    middle = first(hidden)
    found = second(middle.hidden)
    assert not torch.equal(middle.exp_counts, found.exp_counts)
    names, parameters = zip(*model.runs.named_parameters(), strict=True)
    loss = found.hidden.square().sum() + 0.7 * (middle.l_aux + found.l_aux)
    grads = torch.autograd.grad(loss, parameters)

    weights = {
        name: parameter.detach().clone().requires_grad_() for name, parameter in zip(names, parameters, strict=True)
    }
    shared = "blocks.1.moe."
    values, l_aux = hidden, torch.zeros(())
    for prefix in ("0.", "1."):
        mine = {name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)}
        mine |= {name.removeprefix("0."): each for name, each in weights.items() if name.startswith("0." + shared)}
        values, one = reference.double_gated_pair(values, mine, heads=HEADS, position=position)
        l_aux = l_aux + one
    assert largest_relative_error(found.hidden, values) <= 1e-5
    target = torch.autograd.grad(
        values.square().sum() + 0.7 * l_aux, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    largest = max(grad.abs().max() for grad in target)
    for name, grad, expected in zip(names, grads, target, strict=True):
        assert ((grad - expected).abs().max() / expected.abs().max().clamp(min=1e-2 * largest)) <= 1e-5, name


PADDING = (torch.arange(SEQUENCE) < torch.tensor([[SEQUENCE], [5]])).long()
"""The second sequence is padded on the right."""


@pytest.mark.parametrize("dispatch", ["exact", "padded"])
@pytest.mark.parametrize("softmax", ["deepspeed", "all", "chosen", "kept"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_and_padding_equal_reference(k: int, softmax: str, dispatch: str) -> None:
    """With drops at which some tokens lose one choice and some lose all."""
    factor = 0.4
    pair = build_pair("pos2", top_k=k, capacity_factor=factor, gate_softmax=softmax, dispatch=dispatch)
    torch.manual_seed(0)
    order = torch.rand(int(PADDING.sum()), 4) if k == 1 else None
    gate = dict(
        k=k,
        capacity_factor=factor,
        min_capacity=1,
        drop=True,
        order=order,
        softmax=softmax,
        used=PADDING.flatten().bool().tolist(),
    )
    check(pair, PADDING, position="pos2", merge="cg1", gate=gate)


@pytest.mark.parametrize("sequence_lengths", [(12, 5), (1, 0), (0, 0)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_padding_without_drops_equals_reference(k: int, sequence_lengths: tuple[int, int]) -> None:
    pair = build_pair("pos2", top_k=k, drop_tokens=False)
    used = torch.arange(SEQUENCE) < torch.tensor(sequence_lengths).unsqueeze(1)
    gate = dict(k=k, capacity_factor=1.0, min_capacity=1, drop=False, used=used.flatten().tolist())
    check(pair, used, position="pos2", merge="cg1", gate=gate)


def test_drops_happen_in_the_cases_above() -> None:
    """The comparison with drops means nothing if the capacity was never reached."""
    pair = build_pair("pos2", capacity_factor=0.6)
    output = pair(torch.randn(BATCH, SEQUENCE, HIDDEN))
    assert output.exp_counts.max() > 4, "ceil(24 tokens / 4 experts * 0.6) = 4 rows"


def test_every_slot_gives_the_same_bits() -> None:
    pair = build_pair("pos3")
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN)
    results = []
    for slot in range(1, len(backbone(pair)) + 2):
        pair.schedule = type(pair.schedule)(slot)
        torch.manual_seed(0)
        results.append(pair(hidden).hidden)
    assert len(results) == 5
    assert all(torch.equal(result, results[0]) for result in results)
