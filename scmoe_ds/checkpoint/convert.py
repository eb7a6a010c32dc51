"""Weights from a checkpoint to safetensors, as they are or as those of another architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import files, tokenizer_files
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
    """Whole parameters and description of a checkpoint (a directory of them stands for its latest), or of an export.

    Args:
        contents: compare all files with their checksums, which reads them once; otherwise only their sizes.

    Raises:
        CheckpointError: neither, or damaged.
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


def export(source: Path, out: Path, dtype: torch.dtype = torch.float32, shard_bytes: int = 5 * 10**9) -> int:
    """Writes the weights of a checkpoint as safetensors under their global names; see `write_weights`."""
    weights, description = open_weights(source)
    carried = tokenizer_files.read_files(weights.path, description.get(tokenizer_files.KEY))
    return write_weights(out, _readers(weights).items(), _config(description), dtype, shard_bytes, carried)


def residual_to_scmoe(
    source: Path,
    out: Path,
    changes: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
) -> int:
    """Turns a model with DeepSpeed's Residual MoE (architecture shared_expert) into a ScMoE with the same weights.

    Gate, experts, shared expert and coefficient network keep names and layout, and so does the merge: DeepSpeed's is
    cg2. A norm of the shortcut's own starts as a copy of the norm through which the operator after the tap
    reads the tapped value, so that "own" starts where "shared" would.

    Args:
        source: a checkpoint or an export.
        changes: fields of the "scmoe" section that the new model shall have, such as position and shortcut_norm.

    Returns:
        the number of shards; `--load` starts a run with `out`.

    Raises:
        CheckpointError: the source is of another architecture, or post-norm and to have a norm for the shortcut.
        ScMoEConfigError: settings that do not go together.
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
                f"{source} is a post-norm model: it has no norm that a shortcut's own could start "
                'from; give "shortcut_norm": "shared"'
            )
        for run in range(config.moe_layers(settings.num_layers)):
            for name, copied in _shortcut_norm(config, run, readers).items():
                readers[name] = readers[copied]
    carried = tokenizer_files.read_files(weights.path, description.get(tokenizer_files.KEY))
    whole = {**description, **fields.describe_model(settings, config)}
    return write_weights(out, sorted(readers.items()), _config(whole), dtype, shard_bytes, carried)


def _shortcut_norm(config: ScMoEConfig, run: int, readers: Readers) -> dict[str, str]:
    """Parameters of a run's shortcut norm to those that they start from."""
    position = config.first_layer_position if run == 0 else None
    tap = tap_of(config, position or config.position)
    norm = f"runs.{run}.blocks.{tap // 2}.{'mlp_norm' if tap % 2 else 'attention_norm'}."
    return {f"runs.{run}.shortcut_norm.{name.removeprefix(norm)}": name for name in readers if name.startswith(norm)}


def _readers(weights: Weights) -> Readers:
    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: weights.read(name)

    return {name: reader(name) for name in weights.names()}


def _config(description: Mapping[str, Any]) -> dict[str, Any]:
    return {key: description[key] for key in ("model", "gpt", "scmoe", tokenizer_files.KEY) if key in description}
