"""The directory of a trained Hugging Face MoE model, read lazily."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type
from torch import Tensor

from scmoe_ds.checkpoint.adapted.family import is_adapted
from scmoe_ds.checkpoint.autoep.loading import empty_model
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor, tensors_in
from scmoe_ds.errors import CheckpointError
from scmoe_ds.replace import longcat
from scmoe_ds.replace.modeling_adapted import blocks_of, moe_blocks
from scmoe_ds.replace.origin import CONFIG_FILE
from scmoe_ds.replace.presets import offer_presets


class SourceDirectory:
    """A trained model: its config.json, its weights in files, and its class on the meta device.

    Attributes:
        config: of config.json.
        model: without weights.
        layers: number of each MoE layer to the place of its block.

    Raises:
        CheckpointError: missing or damaged files, pickles, or a model that cannot become a ScMoE.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, config_of(path)
        kind = str(self.config.get("model_type"))
        if is_adapted(self.config):
            raise CheckpointError(f"{path}: is adapted already; name the model that it was made of")
        if "text_config" in self.config:
            raise CheckpointError(
                f"{path}: {kind} is more than a language model; save its text model alone by transformers' "
                "AutoModelForCausalLM.from_pretrained and save_pretrained, and adapt that"
            )
        if kind == longcat.FAMILY:
            raise CheckpointError(f"{path}: {kind} has a shortcut of its own already; it needs no surgery")
        self.tensors = tensors_in(path)
        self.model = empty_model(path)
        try:
            self.blocks = blocks_of(self.model)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        offer_presets()
        if preset_name_for_hf_model_type(kind) is None:
            raise CheckpointError(f"{path}: AutoEP knows no family {kind}, so that nothing here could train it further")
        self.layers = [place for _, place in moe_blocks(self.blocks)]

    def names_of(self, place: int) -> str:
        """What the names of a block's weights begin with, in the files."""
        end = f"layers.{place}.input_layernorm.weight"
        name = next((each for each in self.tensors if each == end or each.endswith(f".{end}")), None)
        if name is None:
            raise CheckpointError(f"{self.path}: its files hold no {end}; they are of another model than config.json")
        return name.removesuffix("input_layernorm.weight")

    def read(self, name: str) -> Tensor:
        """A weight by its name in the files."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: its files hold no {name}; they are of another model than config.json")
        return self.tensors[name][...]

    def files(self) -> dict[Path, list[LazyTensor]]:
        """The weights by the file that holds them, in the files' order."""
        found: dict[Path, list[LazyTensor]] = {}
        for tensor in self.tensors.values():
            found.setdefault(tensor.file, []).append(tensor)
        return found


def is_hugging_face(path: Path) -> bool:
    """Whether a directory is of a model of transformers, and no export of this package."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and config.get("format") != "scmoe_ds"


def config_of(path: Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
        CheckpointError: there is none, it is none of transformers', or the weights are quantized.
    """
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: holds no {CONFIG_FILE}; name a model's directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({type(error).__name__}); copy it again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file}: names no model_type, which transformers' own do")
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{path}: its weights are quantized, and could not be trained further; name a directory of bf16 weights"
        )
    return config
