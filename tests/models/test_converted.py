"""An adapted GPT as its source, in part and as a whole, over the same modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings

SETTINGS = GPTSettings(4, 32, 4, 96, 16)
TOKENS = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(5))
SOURCES: dict[str, dict[str, Any]] = {
    "top-k": {"architecture": "pipelined_topk", "top_k": 2},
    "shared expert": {"architecture": "overlapped_shared_expert", "merge": "cg2"},
}


def gpt(recompute: Any = None, **section: Any) -> GPT:
    """Weights by seed and name; where two models have a parameter of one name, it is the same."""
    config = ScMoEConfig(num_experts=4, drop_tokens=False, use_rts=False, **section)
    model = GPT(copy.copy(SETTINGS), config, recompute=recompute)
    initialize_parameters(model, 3, 0.2, 4)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # of ones, the backbone's norm and the shortcut's would be alike
            parameter.data += torch.linspace(-0.5, 0.5, 32)
    return model.eval()


def adapted(source: str, recompute: Any = None, layers: list[int] | None = None, **student: Any) -> GPT:
    base = {"merge": "add", "top_k": 1, **SOURCES[source]}
    model = gpt(recompute, **student, adapt={"base": base, "layers": layers})
    own = dict(gpt(**SOURCES[source], moe_every=student.get("moe_every", 2)).named_parameters())
    for name, parameter in model.named_parameters():
        if "base_coefficient" in name:
            parameter.data.copy_(own[name.replace("base_coefficient", "coefficient")])
    return model


def gradients(model: GPT) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(TOKENS, TOKENS.roll(-1, 1)).loss
    assert loss is not None
    loss.backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    renamed = {name.replace("base_coefficient", "coefficient"): value for name, value in found.items()}
    assert renamed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(renamed[name], value), name


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("merge", ["cg1", "cg2"])
@pytest.mark.parametrize("recompute", [None, "full"])
def test_as_source_it_is_the_source_and_as_scmoe_a_scmoe(source: str, merge: str, recompute: Any) -> None:
    student = {"merge": merge, "top_k": 1, "position": "pos2"}
    model, plain, before = adapted(source, recompute, **student), gpt(**student), gpt(**SOURCES[source])
    with model.conversion.as_source():
        assert_same(gradients(model), gradients(before))
    assert_same(gradients(model), gradients(plain))
    model.conversion.only([1])
    loss = model(TOKENS, TOKENS.roll(-1, 1)).loss
    assert loss is not None
    with model.conversion.as_source():  # a pass between a forward and its backward changes neither
        model(TOKENS)
    loss.backward()
    expected = gradients(adapted(source, None, [1], **student))
    assert torch.equal(loss, expected["loss"])


@pytest.mark.parametrize("source", SOURCES)
def test_layers_that_stay_have_the_parts_of_the_source_alone(source: str) -> None:
    student = {"merge": "cg1", "top_k": 1, "position": "pos1", "moe_every": 1, "join": "late"}
    before = {name for name, _ in gpt(**SOURCES[source], moe_every=1).named_parameters()}
    partial = adapted(source, None, [1, 3], **student)
    more = {name.split(".")[1] for name, _ in partial.named_parameters() if name not in before}
    assert more == {"1", "3"} and partial.conversion.numbers == [1, 3]
    whole = adapted(source, None, None, **student)
    whole.conversion.only([1, 3])
    assert torch.equal(whole(TOKENS).logits, partial(TOKENS).logits)
    assert [pair.late_window is not None for pair in partial.scheduled_pairs()] == [False, True, False, False]
    whole.conversion.only([])
    assert torch.equal(whole(TOKENS).logits, gpt(**SOURCES[source], moe_every=1)(TOKENS).logits)


def test_layers_and_bases_that_cannot_be() -> None:
    with pytest.raises(ScMoEConfigError, match=r"scmoe\.adapt\.layers = \[0, 2\]: the model has the MoE layers 0 … 1"):
        gpt(adapt={"base": {}, "layers": [0, 2]})
    with pytest.raises(ScMoEConfigError, match=r"scmoe\.adapt\.base\.top_k = 5: cannot exceed the number of experts"):
        gpt(adapt={"base": {"top_k": 5}})
