"""Directories of Hugging Face models with experts in parts, by a complete partition (sparse/partition.py).

The result is an ordinary model of the same family with more and narrower experts, of which more are chosen:
transformers loads it by itself. A partial partition has no place there: its gate chooses fewer experts than there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from scmoe_ds.checkpoint.adapted.source import config_of
from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor, close, tensors_in
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.errors import CheckpointError
from scmoe_ds.replace.origin import CONFIG_FILE
from scmoe_ds.sparse.partition import Method, check_parts, input_part, output_part, repeated

_EXPERT = re.compile(r"\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_GATE = re.compile(r"\.(mlp|block_sparse_moe)\.gate\.(weight|e_score_correction_bias)$")
_OUTPUT = ("down_proj", "w2")


@dataclass(frozen=True)
class Family:
    """What a family calls its sizes, and how it scores.

    Attributes:
        width: field of an expert's neurons.
        sigmoid: scores are sigmoids, which a repeated gate leaves as they are.
    """

    width: str = "moe_intermediate_size"
    sigmoid: bool = False


FAMILIES = {
    "mixtral": Family("intermediate_size"),
    "olmoe": Family("intermediate_size"),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(sigmoid=True),
    "glm4_moe": Family(sigmoid=True),
}
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")


def partition_hugging_face(source: Path, out: Path, parts: int, method: Method) -> int:
    """Writes a model of the same family with experts in parts, file by file; returns the number of files.

    Raises:
        CheckpointError: a partial partition, a family that is not known, weights of another form, parts that do not
            fit, routing that would be another one, or `out` cannot be written.
    """
    check_parts(parts)
    config = config_of(source)
    if method == "partial":
        raise CheckpointError(
            "--method partial: transformers has no model whose gate chooses fewer experts than there are; use complete"
        )
    family = _family(source, config)
    changed = partitioned_config(config, family, parts)
    factor = 1.0 if family.sigmoid and not config.get("norm_topk_prob", True) else float(parts)
    tensors = tensors_in(source)
    _check_experts(
        source, tensors, changed[family.width] * parts, next(config[each] for each in _NUMBERS if each in config)
    )
    part = shards.claim(out)
    with shards.one_sentence(out):
        numbers = _write(tensors, part, parts, factor)
        shards.carry(source, part)
        (part / CONFIG_FILE).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
        shards.publish(part, out)
    return numbers


def _family(source: Path, config: Mapping[str, Any]) -> Family:
    kind = str(config["model_type"])
    if kind not in FAMILIES:
        raise CheckpointError(f"{source}: model_type = {kind!r}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def partitioned_config(config: Mapping[str, Any], family: Family, parts: int) -> dict[str, Any]:
    """config.json after a complete partition.

    Raises:
        CheckpointError: sizes that are missing or no sizes, parts that do not divide an expert, or groups that would
            score differently.
    """
    numbers = [field for field in _NUMBERS if field in config] or [_NUMBERS[0]]
    experts, *same, width, k = (_size(config, field) for field in (*numbers, family.width, "num_experts_per_tok"))
    if any(other != experts for other in same):
        raise CheckpointError(f"{CONFIG_FILE}: {' and '.join(numbers)} differ; correct one of them")
    if k > experts:
        raise CheckpointError(f"{CONFIG_FILE}: num_experts_per_tok = {k}: must be at most the {experts} experts")
    check_parts(parts, width)
    changed = {**config, **dict.fromkeys(numbers, experts * parts), family.width: width // parts}
    changed["num_experts_per_tok"] = k * parts
    if config.get("n_shared_experts"):  # whose width is counted in routed experts
        changed["n_shared_experts"] = _size(config, "n_shared_experts") * parts
    if config.get("router_aux_loss_coef"):  # transformers' loss counts each of a token's choices
        changed["router_aux_loss_coef"] = _number(config, "router_aux_loss_coef") / parts
    groups, limit = config.get("n_group"), config.get("topk_group")
    if family.sigmoid and groups and limit != groups:
        raise CheckpointError(
            f"n_group = {groups}: a group scores by its two best experts, which would be parts of one; only models "
            "without limited groups can be partitioned"
        )
    if config["model_type"] == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        # Each expert's parts are a group: they are chosen together, even where scores are equal.
        changed |= {"topk_method": "group_limited_greedy", "n_group": experts, "topk_group": k}
    return changed


def _number(config: Mapping[str, Any], field: str) -> float:
    value = config.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{CONFIG_FILE}: {field} = {json.dumps(value)}: must be a number; write it into the file")
    return value


def _size(config: Mapping[str, Any], field: str) -> int:
    value = _number(config, field)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{CONFIG_FILE}: {field} = {value}: must be a whole number of at least 1; correct it")
    return value


def _check_experts(source: Path, tensors: Mapping[str, LazyTensor], width: int, experts: int) -> None:
    """Raises a CheckpointError unless the files hold the experts of config.json, each by its number."""
    found: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.search(name)
        if expert is not None:
            found.setdefault(f"{name[: expert.start()]}.experts.*.{expert[2]}", set()).add(int(expert[1]))
            neurons = tensor.get_shape()[expert[2] in _OUTPUT]
            if neurons != width:
                raise CheckpointError(
                    f"{source}: {name} has {neurons} neurons, and {CONFIG_FILE} says {width}; correct it"
                )
        elif ".experts." in name:  # a scale of quantised weights, a bias, or all experts in one tensor
            raise CheckpointError(
                f"{source}: {name} is no weight of a single expert, such as …experts.0.{_OUTPUT[0]}.weight; save the "
                "model in bf16 by transformers' save_pretrained"
            )
    if not found:
        raise CheckpointError(f"{source}: its files hold no experts by name, such as …experts.0.{_OUTPUT[0]}.weight")
    for names, numbers in found.items():
        if numbers != set(range(experts)):
            raise CheckpointError(
                f"{source}: its files hold {len(numbers)} of {names}, and {CONFIG_FILE} says {experts}; copy them again"
            )


def _write(tensors: Mapping[str, LazyTensor], directory: Path, parts: int, factor: float) -> int:
    """The source's files, one in memory at a time, each with the parts of its experts, and their index."""
    files: dict[Path, list[str]] = {}
    for name, tensor in tensors.items():
        files.setdefault(tensor.file, []).append(name)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files.values(), start=1):
        target = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        state = dict(each for name in names for each in divided(name, tensors[name][...], parts, factor))
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / target, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in state.values())
        weight_map |= dict.fromkeys(state, target)
    close()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(files)


def divided(name: str, whole: Tensor, parts: int, factor: float) -> Iterator[tuple[str, Tensor]]:
    """What becomes of one of the source's tensors, by name."""
    expert = _EXPERT.search(name)
    if expert is None:
        yield name, repeated(whole, parts) if _GATE.search(name) else whole
        return
    for part in range(parts):
        start, end = expert.span(1)
        own = f"{name[:start]}{int(expert[1]) * parts + part}{name[end:]}"
        is_output = expert[2] in _OUTPUT
        yield own, output_part(whole, part, parts, factor) if is_output else input_part(whole, part, parts)
