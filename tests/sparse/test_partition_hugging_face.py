"""scmoe convert partition of Hugging Face models: transformers loads them by itself, and they compute the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lab.moe_families import FAMILIES, SEQUENCE, VOCABULARY
from scmoe_ds.errors import CheckpointError
from scmoe_ds.programs.convert import main
from scmoe_ds.sparse.hugging_face import partition_hugging_face

TOKENS = torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))


def learn(directory: Path) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")
    if has_loss := getattr(model.config, "router_aux_loss_coef", None):
        model.config.output_router_logits = has_loss > 0
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    return output.logits.detach(), output.loss.detach(), {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_experts_per_tok": 2}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 4}),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
        ("olmoe", {}),
        ("deepseek_v2", {}),
        ("deepseek_v2", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
        ("glm4_moe", {}),
    ],
)
def test_transformers_computes_and_learns_the_same(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family](changes)
    for name, each in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"gate\.(weight|e_score)", name):
            torch.nn.init.normal_(each)  # far from equal scores
    model.double().save_pretrained(tmp_path / "whole", max_shard_size="60KB")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["partition", str(whole), str(parts), "--method", "complete"]) == 0
    logits, loss, grads = learn(whole)
    parted_logits, parted_loss, parted_grads = learn(parts)
    assert (parted_logits - logits).norm() <= 1e-6 * logits.norm()
    assert abs(parted_loss - loss) <= 1e-6 * loss
    factor = 1.0 if changes.get("norm_topk_prob") is False and family == "deepseek_v3" else 2.0
    for name, grad in grads.items():
        found = mapped_back(name, parted_grads[name], grad, factor)
        assert (found - grad).norm() <= 1e-6 * grad.norm() + 1e-12, name


def mapped_back(name: str, found: Tensor, whole: Tensor, factor: float) -> Tensor:
    """The gradient of a whole parameter, by the chain rule from those of its parts."""
    if found.shape == whole.shape:
        return found
    pairs = found.unflatten(0, (len(whole), 2))  # the parts of each expert
    if name.endswith("down_proj"):
        return torch.cat(pairs.unbind(1), -1) * factor
    if name.endswith("gate_up_proj"):
        halves = [part.chunk(2, 1) for part in pairs.unbind(1)]
        return torch.cat([torch.cat(each, 1) for each in zip(*halves, strict=True)], 1)
    return pairs.sum(1)


def test_what_cannot_be_partitioned_is_refused(tmp_path: Path) -> None:
    FAMILIES["deepseek_v3"]({}).save_pretrained(tmp_path / "v3")
    FAMILIES["qwen3_moe"]({}).save_pretrained(tmp_path / "qwen")
    FAMILIES["qwen3_5_moe"]({}).save_pretrained(tmp_path / "next")
    out = tmp_path / "out"
    for source, parts, method, message in (
        ("v3", 2, "complete", "n_group = 4: a group scores by its two best experts"),
        ("qwen", 3, "complete", "--parts 3: must divide the 16 neurons of an expert"),
        ("qwen", 2, "partial", "--method partial: transformers has no model whose gate chooses fewer experts"),
        ("next", 2, "complete", "model_type = .*: must be one of mixtral"),
    ):
        with pytest.raises(CheckpointError, match=message):
            partition_hugging_face(tmp_path / source, out, parts, method)  # type: ignore[arg-type]  # a str
        assert not out.exists()


def test_experts_that_are_not_those_of_the_config_are_refused(tmp_path: Path) -> None:
    FAMILIES["qwen3_moe"]({}).save_pretrained(whole := tmp_path / "whole")
    config, weights = json.loads((whole / "config.json").read_text()), load_file(whole / "model.safetensors")
    expert = "model.layers.0.mlp.experts.3.up_proj.weight"
    scaled = weights | {f"{expert}_scale_inv": torch.ones(1)}
    for changes, tensors, message in (
        ({"num_experts_per_tok": None}, weights, "num_experts_per_tok = null: must be a number"),
        ({"num_experts_per_tok": "3"}, weights, 'num_experts_per_tok = "3": must be a number'),
        ({"num_experts_per_tok": 9}, weights, "num_experts_per_tok = 9: must be at most the 8 experts"),
        ({"moe_intermediate_size": True}, weights, "moe_intermediate_size = true: must be a number"),
        ({"moe_intermediate_size": 2.5}, weights, r"moe_intermediate_size = 2\.5: must be a whole number"),
        ({"router_aux_loss_coef": "a"}, weights, 'router_aux_loss_coef = "a": must be a number'),
        ({"num_local_experts": 8, "num_experts": 16}, weights, "num_experts and num_local_experts differ"),
        ({"moe_intermediate_size": 32}, weights, r"weight has 16 neurons, and config\.json says 32"),
        ({}, {name: each for name, each in weights.items() if name != expert}, "hold 7 of .*up_proj"),
        ({}, scaled, "up_proj.weight_scale_inv is no weight of a single expert"),
    ):
        save_file(tensors, whole / "model.safetensors")
        (whole / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=message):
            partition_hugging_face(whole, tmp_path / "out", 2, "complete")
        assert not (tmp_path / "out").exists()
