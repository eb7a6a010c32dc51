"""scmoe convert partition of this package's models: the same outputs and gradients, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.checkpoint.export import open_weights
from scmoe_ds.checkpoint.parsing import parse
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.programs.convert import main
from scmoe_ds.sparse.own_models import factor_of, partition_own
from scmoe_ds.sparse.partition import Method
from tests.helpers.exports import whole_model, write_export

SETTINGS = GPTSettings(
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
SWIGLU = replace(SETTINGS, swiglu=True, add_bias_linear=False)
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
CASES: dict[str, tuple[GPTSettings, dict[str, Any]]] = {
    "top-1": (SETTINGS, {}),
    "top-1, as chosen": (SWIGLU, {"gate_softmax": "chosen"}),
    "top-2 of DeepSpeed": (SETTINGS, {"architecture": "topk", "top_k": 2, "aux_loss_coefficient": 0}),
    "top-2, all": (SWIGLU, {"top_k": 2, "gate_softmax": "all", "aux_loss_coefficient": 0}),
    "top-4": (SETTINGS, {"architecture": "pipelined_topk", "top_k": 4}),
    "DeepSeek-V2": (
        SWIGLU,
        {
            "top_k": 2,
            "router": {
                "score_func": "softmax",
                "route_norm": False,
                "num_expert_groups": 4,
                "num_limited_groups": 2,
                "group_score_func": "max",
            },
        },
    ),
    "DeepSeek-V3": (
        SETTINGS,
        {
            "top_k": 2,
            "router": {
                "score_func": "sigmoid",
                "route_scale": 2.5,
                "load_balance_coeff": 0.001,
                "load_balance_rule": "proportional",
            },
        },
    ),
    "sigmoids": (SETTINGS, {"router": {"score_func": "sigmoid"}}),
}


def read(path: Path) -> GPT:
    weights, description = open_weights(path)
    found = parse(description, path)
    assert isinstance(found.settings, GPTSettings)
    model = GPT(found.settings, found.config).double()
    model.load_state_dict({name: weights.read(name).double() for name in weights.names()}, strict=True)
    return model


def learn(model: GPT) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients, in training."""
    model.train()
    logits = model(TOKENS).logits
    output = model(TOKENS, labels=TOKENS.roll(-1, 1))
    loss = output.lm_loss + model.config.aux_loss_coefficient * output.moe_loss
    loss.backward()
    return logits.detach(), loss.detach(), {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("method", ["complete", "partial"])
@pytest.mark.parametrize("case", CASES)
def test_a_partition_computes_and_learns_the_same(case: str, method: Method, tmp_path: Path) -> None:
    settings, section = CASES[case]
    source = whole_model(settings, {"num_experts": 8, **section})
    for name, each in source.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(each)
    for name, each in source.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(each, std=0.1)
    write_export(tmp_path / "whole", source)
    assert main(["partition", str(tmp_path / "whole"), str(tmp_path / "parts"), "--method", method]) == 0
    parts = read(tmp_path / "parts")
    logits, loss, grads = learn(read(tmp_path / "whole"))
    parted_logits, parted_loss, parted_grads = learn(parts)
    assert (parted_logits - logits).norm() <= 1e-6 * logits.norm()
    assert abs(parted_loss - loss) <= 1e-6 * loss
    factor = factor_of(source.config, 2, method)
    for name, grad in grads.items():
        found = mapped_back(name, parted_grads, method, factor, settings.swiglu)
        # A gate computes in fp32, and what its rows of two parts learn from their difference cancels in the sum.
        scale = max(grad.norm(), parted_grads[name].norm()) if name.endswith(".gate.wg.weight") else grad.norm()
        assert (found - grad).norm() <= 2e-6 * scale + 1e-9, name


def mapped_back(name: str, grads: dict[str, Tensor], method: Method, factor: float, swiglu: bool) -> Tensor:
    """The gradient of a whole parameter, by the chain rule from those of its parts."""
    head, experts, tail = name.partition(".deepspeed_experts.")
    if not experts:
        gate = name.endswith(".gate.wg.weight") and method == "complete"
        return grads[name].unflatten(0, (-1, 2)).sum(1) if gate else grads[name]
    number, _, leaf = tail.partition(".")
    found = [grads[f"{head}{experts}{int(number) * 2 + part}.{leaf}"] for part in range(2)]
    if leaf == "output.bias":
        return sum(found) * factor / 2  # type: ignore[return-value]  # of tensors
    if leaf == "output.weight":
        return torch.cat(found, 1) * factor
    sections = [part.chunk(2 if swiglu else 1) for part in found]
    return torch.cat([torch.cat(each) for each in zip(*sections, strict=True)])


def test_equal_scores_do_not_mix_the_parts_of_experts(tmp_path: Path) -> None:
    source = whole_model(SETTINGS, {"num_experts": 8, "top_k": 3, "architecture": "pipelined_topk"})
    for name, each in source.named_parameters():
        if name.endswith("gate.wg.weight"):
            each.data[:] = each.data[:1]  # all experts score alike
    write_export(tmp_path / "whole", source)
    partition_own(tmp_path / "whole", tmp_path / "parts", 2, "complete")
    parts = read(tmp_path / "parts").eval()
    routed = parts.moe_layers()[0]
    routing = routed.begin(torch.randn(64, 16, dtype=torch.float64)).routing
    chosen = (routing.expert_KT // 2).sort(0).values
    assert torch.equal(chosen[::2], chosen[1::2])  # both parts of each


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"top_k": 2}, r"aux_loss_coefficient = 0\.01: DeepSpeed's top-2 gate balances first choices alone"),
        ({"architecture": "dgmoe"}, "architecture = 'dgmoe': it routes one expert from each of two layers"),
        ({"expert_partition": 2}, "expert_partition = 2: the experts are in parts already"),
        (
            {"top_k": 2, "router": {"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2}},
            "router.group_score_func = 'top2_sum': a group's two best would be parts of one expert",
        ),
        ({"router": {"z_loss_coefficient": 0.001}}, r"router\.z_loss_coefficient = 0\.001: more logits"),
    ],
)
def test_what_more_choices_cannot_keep_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_export(tmp_path / "whole", whole_model(SETTINGS, {"num_experts": 8, **section}))
    with pytest.raises(CheckpointError, match=message):
        partition_own(tmp_path / "whole", tmp_path / "parts", 2, "complete")
    assert not (tmp_path / "parts").exists()


def test_parts_are_divided_again(tmp_path: Path) -> None:
    source = whole_model(SETTINGS, {"num_experts": 2})
    write_export(tmp_path / "whole", source)
    partition_own(tmp_path / "whole", tmp_path / "halves", 2, "partial")
    partition_own(tmp_path / "halves", tmp_path / "eighths", 4, "partial")
    eighths = read(tmp_path / "eighths")
    assert eighths.config.expert_partition == 8
    torch.testing.assert_close(eighths(TOKENS).logits.float(), source(TOKENS).logits, rtol=1e-5, atol=1e-5)
