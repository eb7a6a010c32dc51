"""A layer whose experts are in parts computes and learns what it did with whole ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

import scmoe_ds
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.decisions.partition import part_of
from scmoe_ds.moe.placement import expert_of, layer_of, with_expert
from scmoe_ds.parallel.tensor import unshard

SHAPE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_layers=4, num_attention_heads=2, max_position_embeddings=16
)
NO_DROPOUT: dict[str, Any] = dict(hidden_dropout=0.0, attention_dropout=0.0)


def trained(parts: int, swiglu: bool, used: Tensor | None, **section: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of whole experts."""
    config = scmoe_ds.ScMoEConfig(num_experts=4, expert_partition=parts, use_rts=False, **section)
    model = GPT(GPTSettings(**SHAPE, **NO_DROPOUT, swiglu=swiglu), config)
    initialize_parameters(model, 1, 0.2, 4)
    model.double()
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    output = model(tokens, labels=tokens.roll(-1, 1), used_token=used)
    loss = output.lm_loss + output.moe_loss
    loss.backward()
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        part, grad = part_of(parameter), parameter.grad
        if part is None or layer_of(name) is None:
            found[name] = grad
        elif part.rule is None:
            found[with_expert(name, expert_of(name) // parts)] = grad  # of each part, that of the whole
        else:
            found.setdefault(with_expert(name, expert_of(name) // parts), []).append((part.rule, grad))
    joined = {
        name: unshard([grad for _, grad in each], each[0][0]) if isinstance(each, list) else each
        for name, each in found.items()
    }
    return loss.item(), joined


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(
    ("section", "masked"),
    [
        ({"top_k": 1}, False),
        ({"top_k": 2, "architecture": "pipelined_topk", "capacity_factor": 0.5}, True),
        ({"top_k": 4, "dispatch": "padded", "overlap": {"num_chunks": 2}}, False),
        ({"top_k": 2, "router": {"score_func": "sigmoid", "load_balance_coeff": 0.001}}, False),
        ({"architecture": "dgmoe", "dispatch": "padded", "capacity_factor": 0.5}, False),
    ],
)
def test_loss_and_gradients_are_those_of_whole_experts(section: dict[str, Any], masked: bool, swiglu: bool) -> None:
    used = torch.ones(2, 16)
    used[:, 12:] = 0
    whole, whole_grads = trained(1, swiglu, used if masked else None, **section)
    parts, parts_grads = trained(2, swiglu, used if masked else None, **section)
    assert parts == pytest.approx(whole, rel=1e-7)
    assert parts_grads.keys() == whole_grads.keys()
    for name, grad in whole_grads.items():
        assert (parts_grads[name] - grad).norm() <= 1e-6 * grad.norm() + 1e-12, name


def test_sections_that_cannot_have_parts() -> None:
    with pytest.raises(ScMoEConfigError, match=r"expert_partition = 2: DeepSpeed's own layers .* pipelined_topk"):
        scmoe_ds.ScMoEConfig(architecture="topk", expert_partition=2)
    with pytest.raises(ScMoEConfigError, match="expert_partition = 2: parts are not divided again"):
        scmoe_ds.ScMoEConfig(expert_partition=2, expert_tensor_parallelism=True)
    with pytest.raises(ScMoEConfigError, match="expert_partition = 3: must divide the 64 neurons"):
        GPT(GPTSettings(**SHAPE), scmoe_ds.ScMoEConfig(expert_partition=3))


def test_expert_tensor_parallelism_by_parts_is_a_partition_over_all_ranks() -> None:
    section = scmoe_ds.ScMoEConfig(num_experts=2, expert_parallel_size=2, expert_tensor_parallelism="partition")
    parts = section.over_tensor_parallel(4)
    assert (parts.expert_partition, parts.expert_parallel_size, parts.expert_tensor_parallelism) == (4, 8, False)
    assert parts.over_tensor_parallel(4) is parts
