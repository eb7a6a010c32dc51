"""Exports the weights of a checkpoint as safetensors, unchanged or as another architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import files, hugging_face, tokenizer_files
from scmoe_ds.checkpoint.directories import locate
from scmoe_ds.checkpoint.parsing import check_counts, parse
from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, SafetensorsWeights, is_export, write_weights
from scmoe_ds.checkpoint.saved_state import SavedState
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.pairs import tap_of

Readers = dict[str, Callable[[], Tensor]]


def open_weights(path: Path, contents: bool = True) -> tuple[Weights, dict[str, Any]]:
    """Whole parameters and description of a checkpoint, of the latest checkpoint of a directory, or of an export.

    Args:
        contents: whether to compare checksums, which reads all files; otherwise only sizes are compared.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = locate(path)
    files.verify(path, "reading", contents)
    export = is_export(path)
    description = files.read_description(path, CONFIG_FILE if export else files.DESCRIPTION_FILE, "reading")
    if not export and "layout" not in description:
        raise CheckpointError(f"{path} was written by an earlier version of scmoe_ds; export it with that version")
    parsed = parse(description, path)
    weights: Weights = SafetensorsWeights(path) if export else SavedState(path, description)
    check_counts(parsed, weights.names(), path)
    return weights, description


def export(
    source: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
    for_transformers: bool = False,
) -> int:
    """Writes the weights of a checkpoint as safetensors under their global names; see `write_weights`.

    Args:
        for_transformers: adds what `AutoModelForCausalLM.from_pretrained` needs to load the same directory.
    """
    weights, description = open_weights(source)
    return _write(out, weights, _readers(weights), description, dtype, shard_bytes, for_transformers)


def residual_to_scmoe(
    source: Path,
    out: Path,
    changes: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """Turns a model with DeepSpeed's Residual MoE (architecture shared_expert) into a ScMoE with the same weights.

    Gate, experts, shared expert and coefficient network keep names and layout. So does the merge: DeepSpeed's is cg2.
    The shortcut's own norm starts as a copy of the norm through which the operator after the tap reads the tapped
    value, so "own" starts like "shared".

    Args:
        source: a checkpoint or an export.
        changes: fields of the "scmoe" section of the new model, such as position and shortcut_norm.

    Returns:
        the number of shards; `--load` starts a run with `out`.

    Raises:
        CheckpointError: the source has another architecture, or is post-norm while the shortcut's norm is "own".
        ScMoEConfigError: the settings contradict each other.
    """
    weights, description = open_weights(source)
    settings, old = fields.rebuild(description)
    if old.architecture not in ("shared_expert", "overlapped_shared_expert"):
        raise CheckpointError(
            f'{source} is a checkpoint of architecture "{old.architecture}"; only a Residual MoE '
            '("shared_expert") has the parts of a ScMoE'
        )
    merge = "cg2" if old.architecture == "shared_expert" else old.merge
    section = {**old.model_dump(mode="json"), "architecture": "scmoe", "merge": merge, **changes}
    config = ScMoEConfig.from_deepspeed({"scmoe": section})
    config.check_model(settings.num_layers)
    readers = _readers(weights)
    if config.shortcut_norm == "own":
        if settings.norm_placement != "pre":
            raise CheckpointError(
                f"{source} is a post-norm model: it has no norm that the shortcut's own norm "
                'could copy; give "shortcut_norm": "shared"'
            )
        for pair in range(config.moe_layers(settings.num_layers)):
            for name, copied in _shortcut_norm(config, pair, readers).items():
                readers[name] = readers[copied]
    whole = {**description, **fields.describe_model(settings, config)}
    return _write(out, weights, readers, whole, dtype, shard_bytes)


def _shortcut_norm(config: ScMoEConfig, pair: int, readers: Readers) -> dict[str, str]:
    """Each parameter of a pair's shortcut norm to the parameter that it starts as a copy of."""
    position = config.first_layer_position if pair == 0 else None
    tap = tap_of(config, position or config.position)
    norm = f"runs.{pair}.blocks.{tap // 2}.{'mlp_norm' if tap % 2 else 'attention_norm'}."
    return {f"runs.{pair}.shortcut_norm.{name.removeprefix(norm)}": name for name in readers if name.startswith(norm)}


def _readers(weights: Weights) -> Readers:
    return {name: partial(weights.read, name) for name in weights.names()}


def _write(
    out: Path,
    weights: Weights,
    readers: Readers,
    whole: Mapping[str, Any],
    dtype: torch.dtype,
    shard_bytes: int,
    for_transformers: bool = False,
) -> int:
    config = {key: whole[key] for key in ("model", "gpt", "scmoe", tokenizer_files.KEY) if key in whole}
    record = whole.get(tokenizer_files.KEY)
    carried = tokenizer_files.read_files(weights.path, record)
    if for_transformers:
        parsed = parse(whole, weights.path)
        config |= hugging_face.describe_for_transformers(parsed, record)
        carried |= hugging_face.files_for_transformers(weights.path, config["vocab_size"], record)
    return write_weights(out, sorted(readers.items()), config, dtype, shard_bytes, carried)
