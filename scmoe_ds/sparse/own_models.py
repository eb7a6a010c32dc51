"""Checkpoints and exports of this package's GPT with experts in parts; sparse/partition.py says which.

A complete partition is an ordinary model of K · P of E · P experts. Each expert's parts are a group of its router, and
a token takes K groups whole. So the chosen parts are those of the chosen experts even where experts score alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint.description import describe_model
from scmoe_ds.checkpoint.export import open_weights, write_export
from scmoe_ds.checkpoint.finished import finished
from scmoe_ds.checkpoint.parsing import DTYPES, parse
from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.checkpoint.safetensors_files import is_export
from scmoe_ds.config.adapt_section import same_layers
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.moe.placement import expert_of, layer_of, with_expert
from scmoe_ds.moe.router import CORRECTION_BIAS
from scmoe_ds.sparse.partition import Method, check_parts, input_part, output_bias, output_part, repeated

_GATE = re.compile(rf"\.deepspeed_moe\.gate\.(wg\.weight|{CORRECTION_BIAS})$")


def partition_own(source: Path, out: Path, parts: int, method: Method) -> int:
    """Writes a model with experts in parts as an export, an export's in its number format; returns the number of files.

    Raises:
        CheckpointError: no checkpoint of a GPT, parts that do not fit, a setting that the method cannot keep, or `out`
            is not empty.
    """
    check_parts(parts)
    weights, description = finished(*open_weights(source))
    found = parse(description, weights.path)
    settings, config = found.settings, found.config
    if not isinstance(settings, GPTSettings):
        raise CheckpointError(f"{source}: is a checkpoint of a Swin; only experts of text models are divided here")
    width = config.moe_ffn_hidden_size or settings.ffn_hidden_size
    check_parts(parts, width // config.expert_partition)
    section = partial_section(config, parts) if method == "partial" else complete_section(config, parts, width)
    divided = PartitionedWeights(weights, parts, method, 1 + settings.swiglu, factor_of(config, parts, method))
    whole = {**description, **describe_model(settings, section)}
    dtype = DTYPES[found.dtype] if is_export(weights.path) else torch.float32
    return write_export(out, divided, whole, dtype)


class PartitionedWeights:
    """The parameters of a model with experts in parts, out of those of whole ones; a `reshard.Weights`.

    Args:
        source: of whole experts.
        projections: which an expert's input weights have below each other.
        factor: of the parts' output weights.
    """

    def __init__(self, source: Weights, parts: int, method: Method, projections: int, factor: float) -> None:
        self.path, self._source, self._parts = source.path, source, parts
        self._repeats, self._projections, self._factor = method == "complete", projections, factor
        self._made = dict(self._names())

    def _names(self) -> Iterator[tuple[str, tuple[str, int]]]:
        for name in self._source.names():
            if layer_of(name) is None:
                yield name, (name, 0)
                continue
            for part in range(self._parts):
                yield with_expert(name, expert_of(name) * self._parts + part), (name, part)

    def names(self) -> list[str]:
        return sorted(self._made)

    def shape(self, name: str) -> Sequence[int]:
        source, _ = self._made[name]
        return self._divided(name, torch.empty(list(self._source.shape(source)), device="meta")).shape

    def read(self, name: str) -> Tensor:
        source, _ = self._made[name]
        return self._divided(name, self._source.read(source))

    def _divided(self, name: str, whole: Tensor) -> Tensor:
        source, part = self._made[name]
        if layer_of(source) is None:
            return repeated(whole, self._parts) if self._repeats and _GATE.search(source) else whole
        if source.endswith(".output.bias"):
            return output_bias(whole, self._parts, self._factor)
        if source.endswith(".output.weight"):
            return output_part(whole, part, self._parts, self._factor)
        return input_part(whole, part, self._parts, self._projections)


def partial_section(config: ScMoEConfig, parts: int) -> ScMoEConfig:
    """What describes the model after a partial partition. Layers of DeepSpeed become this package's equal ones."""
    changes = {
        **same_layers(config),
        "expert_partition": config.expert_partition * parts,
        "expert_tensor_parallelism": False,
    }
    return ScMoEConfig.from_deepspeed({"scmoe": {**config.model_dump(mode="json"), **changes}})


def complete_section(config: ScMoEConfig, parts: int, width: int) -> ScMoEConfig:
    """What describes the model after a complete partition: a router that scores as before, without drops.

    Args:
        width: of a whole expert.

    Raises:
        CheckpointError: a setting under which more experts per token could not be the same.
    """
    for field, broken, why in _rules_of_complete(config):
        if broken:
            value = config.router if "." in field else config
            value = getattr(value, field.rpartition(".")[2])
            raise CheckpointError(f"--method complete: scmoe.{field} = {value!r}: {why}; use --method partial")
    experts, k, router = config.num_experts, config.top_k, config.router
    assert isinstance(experts, int)
    limits: dict[str, Any] = {}
    if router.num_expert_groups is None or router.group_score_func == "top2_sum":
        limits = {"num_expert_groups": experts, "num_limited_groups": k, "group_score_func": "max"}
    proportional = router.load_balance_rule == "proportional" and router.load_balance_coeff
    if proportional:  # a part is missing 1 / P of what the expert was
        limits["load_balance_coeff"] = proportional * parts
    changes: dict[str, Any] = {
        "num_experts": experts * parts,
        "top_k": k * parts,
        "moe_ffn_hidden_size": width // parts,
        "router": {
            **router.model_dump(mode="json"),
            "score_func": router.score_func or "softmax",
            "route_norm": _adds_up_to_one(config),
            **limits,
        },
        "gate_softmax": "deepspeed",  # which the router does not read
        "top2_2nd_expert_sampling": False,
        "drop_tokens": False,
    }
    return ScMoEConfig.from_deepspeed({"scmoe": {**config.model_dump(mode="json"), **changes}})


def _rules_of_complete(config: ScMoEConfig) -> Iterator[tuple[str, bool, str]]:
    """A field, whether its value has no equal with K · P experts per token, and why."""
    router, pyramid = config.router, isinstance(config.num_experts, list)
    gate = router.score_func is None
    limited = router.num_expert_groups is not None and router.num_limited_groups != router.num_expert_groups
    yield "architecture", config.architecture == "dgmoe", "it routes one expert from each of two layers"
    yield "num_experts", pyramid, "the router's groups are of one number"
    yield "expert_partition", config.expert_partition > 1, "the experts are in parts already"
    yield "adapt", config.adapt is not None, "the layers of its base choose by another gate"
    sampled = config.noisy_gate_policy == "RSample"
    yield "noisy_gate_policy", sampled, "the parts of an expert would be drawn apart"
    yield (
        "top2_2nd_expert_sampling",
        config.top2_2nd_expert_sampling and config.top_k == 2,
        "parts would be drawn apart",
    )
    two = gate and config.top_k == 2 and config.aux_loss_coefficient > 0
    yield "aux_loss_coefficient", two, "DeepSpeed's top-2 gate balances first choices alone, other gates all of them"
    yield "router.z_loss_coefficient", router.z_loss_coefficient > 0, "more logits have another log-sum-exp"
    best_two = limited and router.group_score_func == "top2_sum"
    yield "router.group_score_func", best_two, "a group's two best would be parts of one expert"


def _adds_up_to_one(config: ScMoEConfig) -> bool:
    """Whether a token's weights do."""
    if config.router.score_func is not None:
        return config.router.normalises(config.top_k)
    return config.gate_softmax in ("chosen", "kept") or (config.gate_softmax == "deepspeed" and config.top_k > 1)


def factor_of(config: ScMoEConfig, parts: int, method: Method) -> float:
    """By which the parts' outputs are multiplied. A sigmoid's score does not shrink where rows of the gate repeat."""
    shrinks = config.router.score_func != "sigmoid" or _adds_up_to_one(config)
    return float(parts) if method == "complete" and shrinks else 1.0
