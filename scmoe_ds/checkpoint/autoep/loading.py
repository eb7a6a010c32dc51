"""`from_pretrained`: a Hugging Face MoE model of which a rank holds its own experts alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

from scmoe_ds.checkpoint.adapted.family import is_adapted, source_config
from scmoe_ds.checkpoint.autoep import tensor_slices
from scmoe_ds.checkpoint.autoep.blueprint import Block, Blueprint
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor, tensors_in
from scmoe_ds.compat_transformers import alone_and_in_turn
from scmoe_ds.config.deepspeed_json import at, load_deepspeed_json, section
from scmoe_ds.config.loading import LoadedConfig, Source
from scmoe_ds.errors import CheckpointError, ScMoEConfigError, first_line, one_line
from scmoe_ds.parallel.agreement import run_together
from scmoe_ds.parallel.process import connect
from scmoe_ds.replace.adapted_parts import as_adapted
from scmoe_ds.replace.autoep_model import check_model_for_autoep
from scmoe_ds.replace.modeling_adapted import add_parts
from scmoe_ds.replace.origin import CONFIG_FILE, Adapted, remember
from scmoe_ds.replace.own_experts import OwnExperts, mark, widen
from scmoe_ds.replace.presets import offer_presets

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FUSED = re.compile(r"\.experts\.\w+$")
_WEIGHTS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def from_pretrained(
    source: str | os.PathLike[str],
    config: Source,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **settings: Any,
) -> nn.Module:
    """A Hugging Face MoE model whose experts are this rank's alone, for `scmoe_ds.initialize` with the same JSON.

    As transformers' `AutoModelForCausalLM.from_pretrained`, without ever holding the other ranks' experts. Every rank
    reads all other weights. Until the engine exists, the model cannot compute. A directory of `scmoe adapt` gives the
    trained model's class with the ScMoE's weights, and the engine runs it as the ScMoE that it is. Collective.

    Args:
        source: a directory with config.json and safetensors, or an id on the Hugging Face hub.
        config: the DeepSpeed JSON with "expert_parallel": a path or a dict.
        dtype: of the weights; "auto": as config.json says, else as the files have it.
        revision: of the hub.
        settings: handed on to transformers, such as attn_implementation.

    Raises:
        ScMoEConfigError: the JSON does not use AutoEP, its size does not fit, or its section differs from what the
            directory was adapted with.
        CheckpointError: on every rank: files that are missing, damaged, pickles, or of another model.
    """
    whole = config.whole if isinstance(config, LoadedConfig) else load_deepspeed_json(config)
    connect()
    own = _own_experts(whole)
    directory = _directory(source, revision)
    return run_together(lambda: _load(directory, str(source), whole, own, dtype, settings))


def _own_experts(whole: Mapping[str, Any]) -> OwnExperts:
    if not at(whole, "expert_parallel.enabled"):
        raise ScMoEConfigError(
            "expert_parallel.enabled: from_pretrained divides experts as AutoEP does; set it to true, or use "
            "transformers' own from_pretrained"
        )
    if (at(whole, "tensor_parallel.autotp_size") or 1) > 1:
        raise ScMoEConfigError(
            f"tensor_parallel.autotp_size = {at(whole, 'tensor_parallel.autotp_size')}: from_pretrained divides "
            "experts only; set 1, or use transformers' own from_pretrained"
        )
    size, ranks, rank = int(at(whole, "expert_parallel.autoep_size") or 1), dist.get_world_size(), dist.get_rank()
    if size < 1 or ranks % size:
        raise ScMoEConfigError(f"expert_parallel.autoep_size = {size}: must divide the world size {ranks}")
    data_first = at(whole, "use_data_before_expert_parallelism")
    return OwnExperts(size, rank // (ranks // size) if data_first else rank % size)


def _directory(source: str | os.PathLike[str], revision: str | None) -> Path:
    """The local directory, after a download where it is an id of the hub. Collective."""
    if Path(source).is_dir():
        return Path(source)

    def download() -> str:
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(str(source), revision=revision, allow_patterns=_WEIGHTS)
        except Exception as error:  # of the network, the hub, or the id
            raise CheckpointError(
                f"{source}: is no directory, and cannot be had from the Hugging Face hub ({first_line(error)}); name "
                "a directory"
            ) from None

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # one rank of a node downloads, the others find it there
    run_together(lambda: download() if first else "")
    return Path(run_together(download))


def _load(
    directory: Path,
    source: str,
    whole: Mapping[str, Any],
    own: OwnExperts,
    dtype: str | torch.dtype,
    settings: Mapping[str, Any],
) -> nn.Module:
    empty, adapted = empty_model(directory, settings), adapted_in(directory)
    if adapted is not None:
        as_adapted(whole, adapted.scmoe, str(directory))
    offer_presets()  # the check asks for them
    check_model_for_autoep(empty, whole)
    blueprint = Blueprint(empty, section(whole, "expert_parallel"))
    blocks = blueprint.blocks
    for block in blocks:
        if block.num_experts % own.ep_size:
            raise ScMoEConfigError(
                f"expert_parallel.autoep_size = {own.ep_size}: must divide the {block.num_experts} experts of "
                f"{block.path}"
            )
    state = _own_tensors(tensors_in(directory), blocks, own)
    kind = _with_own_experts(type(blueprint.model), blocks, own, None if adapted is None else adapted.scmoe)
    dtype = _dtype(dtype, blueprint.model.config, state)
    try:
        with alone_and_in_turn():
            model, found = kind.from_pretrained(
                None, config=blueprint.model.config, state_dict=state, dtype=dtype, output_loading_info=True, **settings
            )
    except (RuntimeError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{source}: its weights do not make a {type(blueprint.model).__name__} ({one_line(error, 400)}); "
            "config.json and the files must be of one model"
        ) from None
    finally:
        tensor_slices.close()
    model.__class__ = type(blueprint.model)
    parts = {name for name in found["missing_keys"] if ".shortcut." in name}
    if lost := sorted(blueprint.expert_names & set(found["missing_keys"]) | parts):
        raise CheckpointError(
            f"{source}: holds no weights of {lost[0]} and {len(lost) - 1} more; its files are of another model than "
            f"its config.json ({model.config.model_type})"
        )
    for block in blocks:
        experts = model.get_submodule(block.experts)
        first = own.ep_rank * (block.num_experts // own.ep_size)
        for name, rows in ((block.gate_up, block.rows), (block.down, block.num_experts)):
            widen(experts, name.rpartition(".")[2], rows, first)
    mark(model, own, [model.get_submodule(block.experts) for block in blocks], adapted is not None)
    _finish(model, directory, source, adapted)
    return model


def adapted_in(directory: Path) -> Adapted | None:
    """What an adapted directory was made of, and what it was adapted with; None: the directory is none."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # which transformers says better
    if not isinstance(config, Mapping) or not is_adapted(config):
        return None
    return Adapted(source_config(config), config["scmoe"])


def empty_model(directory: Path, settings: Mapping[str, Any] | None = None) -> Any:
    """The model of a directory's config.json on the meta device, for an adapted one that of the trained model."""
    adapted = adapted_in(directory)
    try:
        if adapted is None:
            config = transformers.AutoConfig.from_pretrained(directory)
        else:
            config = transformers.AutoConfig.for_model(**adapted.config)
        with torch.device("meta"), alone_and_in_turn():
            return transformers.AutoModelForCausalLM.from_config(config, **(settings or {}))
    except Exception as error:  # of transformers, of huggingface_hub's checks of fields, or of torch, by the field
        raise CheckpointError(f"{directory}: transformers makes no model of it ({one_line(error, 400)})") from None


def _own_tensors(found: dict[str, LazyTensor], blocks: list[Block], own: OwnExperts) -> dict[str, LazyTensor]:
    """The tensors of the files, without other ranks' experts."""
    local = {_numbers(block.path): block.num_experts // own.ep_size for block in blocks}
    kept = {}
    for name, tensor in found.items():
        one, fused = _EXPERT.search(name), _FUSED.search(name)
        place = one or fused
        # Files may name a block otherwise than the model; the numbers of its layer are the same.
        count = local.get(_numbers(name[: place.start()])) if place else None
        if count is not None and one is not None:
            if int(one[1]) // count != own.ep_rank:
                continue
        elif count is not None:
            tensor = LazyTensor(tensor.file, tensor.name, slice(own.ep_rank * count, (own.ep_rank + 1) * count))
        kept[name] = tensor
    return kept


def _numbers(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part.isdigit())


def _with_own_experts(kind: type, blocks: list[Block], own: OwnExperts, scmoe: Mapping[str, Any] | None) -> Any:
    """The model's class, whose new models have room for this rank's experts alone, and for an adapted model's parts:
    transformers compares names and shapes."""

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        if scmoe is not None:
            add_parts(self, scmoe)
        for block in blocks:
            for name in (block.gate_up, block.down):
                owner, _, last = name.rpartition(".")
                parameter = self.get_parameter(name)
                shape = (block.num_experts // own.ep_size, *parameter.shape[1:])
                setattr(self.get_submodule(owner), last, nn.Parameter(parameter.new_empty(shape)))

    # The name says which conversion of weights and which loss transformers uses.
    return type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})


def _dtype(asked: str | torch.dtype, config: Any, state: Mapping[str, LazyTensor]) -> torch.dtype:
    """The dtype that is asked for. "auto": config.json's, else that of the first tensor with decimals."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked == "auto":
        found = getattr(config, "dtype", None)
        if found is None:
            names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
            found = next((names[kind] for each in state.values() if (kind := each.get_dtype()) in names), "float32")
        asked = str(found).removeprefix("torch.")
    dtype = getattr(torch, asked, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f'dtype = "{asked}": is no dtype of torch; use "auto", "bfloat16", "float16" or "float32"'
        )
    return dtype


def _finish(model: Any, directory: Path, source: str, adapted: Adapted | None) -> None:
    """What transformers adds where it knows the directory."""
    model.name_or_path = model.config.name_or_path = source
    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    remember(model, directory, adapted)
