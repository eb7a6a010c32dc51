"""What AutoEP needs of a Hugging Face model, checked before DeepSpeed replaces its MoE blocks.

DeepSpeed skips blocks that it does not recognise without a word, and copies what two blocks share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets.registry import (
    PRESET_MODELS,
    preset_name_for_hf_model_type,
    unsupported_preset_for_hf_model_type,
)
from torch import nn

from scmoe_ds.config.deepspeed_json import at
from scmoe_ds.config.expert_parallel import PATH, autoep_size
from scmoe_ds.config.messages import fail, more_ranks
from scmoe_ds.errors import ScMoEConfigError, one_line
from scmoe_ds.parallel.output import log
from scmoe_ds.replace.presets import is_ours, offer_presets


def check_model_for_autoep(model: nn.Module, whole: Mapping[str, Any]) -> None:
    """Says which preset of ours is used, if one is.

    Raises:
        ScMoEConfigError: an engine's model, no experts, a family without a preset, sizes that do not divide, adapters
            of peft on or above a MoE block, or a block or experts that two places of the model share.
    """
    if any(isinstance(module, AutoEPMoELayer) for module in model.modules()):
        raise ScMoEConfigError(
            f"{PATH}: the blocks of {type(model).__name__} are AutoEP layers already, of an engine that was made of "
            "it; use that engine, or make the model anew"
        )
    blocks = list(_blocks(model))
    if not blocks:
        raise ScMoEConfigError(f"{PATH}: {type(model).__name__} has no block with experts; remove the section")
    _check_preset(model, whole)
    _check_size(blocks[0], autoep_size(whole), dist.get_world_size())
    _check_adapters(model, whole)
    _check_shared(model)


def moe_specs(model: nn.Module, expert_parallel: Mapping[str, Any]) -> list[Any]:
    """What AutoEP finds out about the MoE blocks of a model, in their order; DeepSpeed's MoELayerSpec each.

    Raises:
        ScMoEConfigError: it finds none, or does not know the family.
    """
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    offer_presets()
    try:
        found = AutoEP(model, parse_autoep_config(dict(expert_parallel))).ep_parser()
    except ValueError as error:
        raise ScMoEConfigError(f"{PATH}: {one_line(error, 600)}") from None
    if not found:
        raise ScMoEConfigError(
            f"{PATH}: AutoEP finds no MoE block in {type(model).__name__}; remove the section, or name the blocks in "
            f"{PATH}.moe_layer_pattern"
        )
    return list(found)


def _check_preset(model: nn.Module, whole: Mapping[str, Any]) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if str(kind).startswith("scmoe_"):
        raise ScMoEConfigError(
            f"{PATH}: {type(model).__name__} runs in transformers alone; load its directory by scmoe_ds.from_pretrained"
        )
    own, by_hand = preset_name_for_hf_model_type(str(kind)), at(whole, f"{PATH}.preset_model")
    if by_hand in PRESET_MODELS and own not in (None, by_hand):
        rule = f'the model is of the family "{own}"; set that, or leave it out'
        raise fail(f"{PATH}.preset_model", by_hand, rule)
    name = by_hand or own
    if name is not None and is_ours(name):
        log(f'expert_parallel: DeepSpeed has no preset for "{name}"; scmoe_ds offers its own as one of AutoEP\'s')
    known_otherwise = at(whole, f"{PATH}.moe_layer_pattern") or unsupported_preset_for_hf_model_type(str(kind))
    if kind and name is None and not known_otherwise:
        known = ", ".join(sorted(each for preset in PRESET_MODELS.values() for each in preset.hf_model_types))
        raise ScMoEConfigError(
            f'{PATH}: AutoEP has no preset for {type(model).__name__} (model_type "{kind}"), only for {known}; name '
            f"its MoE blocks in {PATH}.moe_layer_pattern, or remove the section"
        )


def _check_size(block: tuple[str, Any], size: int, ranks: int) -> None:
    name, module = block
    count = next((len(each) for each in module.experts.parameters() if each.ndim == 3), None)
    experts = count or len(list(module.experts.children())) or size
    if ranks % size:
        raise fail(f"{PATH}.autoep_size", size, f"must divide the world size {ranks}; {more_ranks(size)}")
    if experts % size:
        fitting = ", ".join(str(each) for each in range(1, experts + 1) if experts % each == 0)
        raise fail(f"{PATH}.autoep_size", size, f"must divide the {experts} experts of {name}; use one of {fitting}")


def _check_adapters(model: nn.Module, whole: Mapping[str, Any]) -> None:
    for name, module in _blocks(model):
        for part, each in module.named_modules():
            if _is_of_peft(each):
                raise ScMoEConfigError(
                    f"{PATH}: {name}.{part} is a {type(each).__name__} of peft, and AutoEP takes over plain routers "
                    "and experts only; keep adapters to the attention, or merge them with merge_and_unload()"
                )
    if _is_of_peft(model) and not at(whole, f"{PATH}.moe_layer_pattern"):
        found = next((name for name, _ in _blocks(model)), "base_model.model.model.layers.0.mlp")
        pattern = r"\\.".join(r"\\d+" if each.isdigit() else each for each in found.split("."))
        raise ScMoEConfigError(
            f"{PATH}: {type(model).__name__} puts its own path before the MoE blocks; set {PATH}.moe_layer_pattern to "
            f'"{pattern}" and {PATH}.preset_model to the model\'s family'
        )


def _check_shared(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, module in _blocks(model):
        for key in {id(module), *map(id, module.experts.parameters())}:
            if owners.setdefault(key, name) != name:
                raise ScMoEConfigError(
                    f"{PATH}: {owners[key]} and {name} share their experts, of which AutoEP would make copies; give "
                    "each block its own"
                )


def _blocks(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with experts, under every path that they have."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "experts", None), nn.Module):
            yield name, module


def _is_of_peft(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"
