"""Exports of models with random weights, and the models themselves as a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import files
from scmoe_ds.checkpoint.description import describe_model
from scmoe_ds.checkpoint.safetensors_files import write_weights
from scmoe_ds.checkpoint.tokenizer_files import describe, record
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.durable_files import file_entry
from scmoe_ds.data.tokenizer import ByteTokenizer
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings


def whole_model(settings: GPTSettings, section: dict[str, Any], seed: int = 5, std: float = 0.3) -> GPT:
    """A model of one rank with no drops, so that its outputs depend on nothing but each sequence."""
    free = {"drop_tokens": False, "use_rts": False, "min_capacity": 0}
    model = GPT(settings, ScMoEConfig.from_deepspeed({"scmoe": {**section, **free}}))
    initialize_parameters(model, seed, std, settings.num_layers)
    return model.eval()


def write_export(
    path: Path, model: GPT, dtype: torch.dtype = torch.float32, shard_bytes: int = 10**9, **section: Any
) -> Path:
    """Its weights as an export; `section`: fields that the description says instead of the model's own."""
    changed = ScMoEConfig.from_deepspeed({"scmoe": {**model.config.model_dump(mode="json"), **section}})
    weights = [(name, _reader(tensor)) for name, tensor in sorted(model.state_dict().items())]
    description = describe_model(model.settings, changed)
    if model.settings.vocab_size > ByteTokenizer().eod:
        description["tokenizer"] = record(describe(ByteTokenizer()), {})
    write_weights(path, weights, description, dtype, shard_bytes)
    return path


def sign(path: Path) -> Path:
    """A manifest that agrees with what is there."""
    (path / files.MANIFEST_FILE).unlink(missing_ok=True)
    manifest = {file.name: file_entry(file) for file in path.iterdir()}
    (path / files.MANIFEST_FILE).write_text(json.dumps(manifest))
    return path


def _reader(parameter: Tensor) -> Any:
    return lambda: parameter.detach()


@torch.no_grad()
def greedy(model: GPT, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """A completion by whole forward passes, and [count, V] the logits that each token was chosen from."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        output = model(torch.tensor([tokens])).logits
        assert output is not None
        logits.append(output[0, -1])
        tokens.append(int(output[0, -1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)
