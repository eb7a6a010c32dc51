"""Exports the weights of a checkpoint as safetensors, unchanged or as another architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import files, hugging_face, tokenizer_files
from scmoe_ds.checkpoint.directories import locate
from scmoe_ds.checkpoint.finished import finished
from scmoe_ds.checkpoint.parsing import check_counts, parse
from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, SafetensorsWeights, is_export, write_weights
from scmoe_ds.checkpoint.saved_state import SavedState
from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.agreement import run_together

Readers = dict[str, Callable[[], Tensor]]


def open_weights(path: Path, contents: bool = True) -> tuple[Weights, dict[str, Any]]:
    """Whole parameters and description of a checkpoint, of the latest checkpoint of a directory, or of an export.
    Collective.

    Args:
        contents: whether to compare checksums, which reads all files; otherwise only sizes are compared.

    Raises:
        CheckpointError: on every rank: there is no such checkpoint, or it is damaged.
    """
    found = run_together(lambda: locate(path))
    files.verify(found, "reading", contents)
    return run_together(lambda: _open(found))


def _open(path: Path) -> tuple[Weights, dict[str, Any]]:
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
    weights, description = finished(*open_weights(source))
    return write_export(out, weights, description, dtype, shard_bytes, for_transformers)


def write_export(
    out: Path,
    weights: Weights,
    whole: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 * 10**9,
    for_transformers: bool = False,
) -> int:
    """Writes weights under their global names, and what describes them; see `export`.

    Args:
        whole: description of the model, whose tokenizer is at the weights' path.
    """
    config = {key: whole[key] for key in ("model", "gpt", "scmoe", tokenizer_files.KEY) if key in whole}
    record = whole.get(tokenizer_files.KEY)
    carried = tokenizer_files.read_files(weights.path, record)
    if for_transformers:
        parsed = parse(whole, weights.path)
        config |= hugging_face.describe_for_transformers(parsed, record)
        carried |= hugging_face.files_for_transformers(weights.path, config["vocab_size"], record)
    readers = [(name, partial(weights.read, name)) for name in sorted(weights.names())]
    return write_weights(out, readers, config, dtype, shard_bytes, carried)
