"""Loads SwinV2 models, and the images for their analysis.

Shape suffixes: B images, C channels, S pixels a side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.analysis.subjects import load_hugging_face, local_directory
from scmoe_ds.checkpoint.export import open_weights
from scmoe_ds.checkpoint.parsing import parse, without_memory
from scmoe_ds.checkpoint.reshard import check_parameters
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.images import Digits, ImageFolder
from scmoe_ds.errors import AnalysisError, CheckpointError, reason_of
from scmoe_ds.models.swin import SwinMoE
from scmoe_ds.models.swin_settings import SwinSettings
from scmoe_ds.moe.placement import global_names
from scmoe_ds.moe.router import correction_biases


def open_swin(path: str, device: torch.device) -> SwinMoE:
    """Loads a checkpoint of scmoe pretrain-swin for one process, without drops. Raises a CheckpointError if there is
    none, or it is damaged or of another model."""
    weights, description = open_weights(Path(path))
    print(f"loading {weights.path}", file=sys.stderr)
    found = parse(description, weights.path)
    if not isinstance(found.settings, SwinSettings):
        raise CheckpointError(f"--images goes with a SwinV2; {path} is a checkpoint of another model")
    free: dict[str, Any] = {
        "expert_parallel_size": 1,
        "drop_tokens": False,
        "min_capacity": 0,
        "noisy_gate_policy": None,
        "overlap": {},
    }
    config = ScMoEConfig.from_deepspeed({"scmoe": {**description["scmoe"], **free}})
    settings = found.settings
    model = without_memory(lambda: SwinMoE(settings, config), weights.path)
    names = global_names(model)
    check_parameters(model, weights, names)
    model = SwinMoE(settings, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(names[name]))
        for name, bias in correction_biases(model).items():
            bias.copy_(weights.read(name))
    return model.to(device).eval()


def open_hugging_face_swin(directory: str, device: torch.device) -> nn.Module:
    """Loads a Swinv2 of transformers from a local directory, without its head. Downloads nothing. Raises an
    AnalysisError if the directory is missing or holds another model."""
    try:
        config = json.loads((local_directory(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AnalysisError(f"--hf-model {directory}: its config.json cannot be read ({reason_of(error)})") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "swinv2":
        raise AnalysisError(f'--images goes with a SwinV2; --hf-model {directory} is a "{kind}"')
    from transformers import Swinv2Model

    model = load_hugging_face(Swinv2Model, directory, "a SwinV2")
    return model.to(device).eval()


def image_batches(source: str, model: Any, batch_size: int, max_images: int | None) -> Iterator[Tensor]:
    """[B, C, S, S] in -1 … 1, scaled to the model's size.

    Args:
        source: "digits", or a directory of <class>/<image>.
        model: of `open_swin` or `open_hugging_face_swin`.

    Raises:
        DataError: there are no such images.
    """
    shape = model.settings if isinstance(model, SwinMoE) else model.config
    images = (
        Digits(shape.image_size) if source == "digits" else ImageFolder(source, shape.image_size, shape.num_channels)
    )
    count = len(images) if max_images is None else min(len(images), max_images)
    for first in range(0, count, batch_size):
        members = [images[number]["images"] for number in range(first, min(first + batch_size, count))]
        batch_BCSS = torch.stack(members)
        if batch_BCSS.shape[1] != shape.num_channels:
            raise AnalysisError(
                f"--images {source}: the images have {batch_BCSS.shape[1]} channel(s), the model {shape.num_channels}"
            )
        yield batch_BCSS
