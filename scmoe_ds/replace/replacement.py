"""`replace_moe_layers` and its undoing."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.compat import children_of, forward_hooks
from scmoe_ds.config.loading import Source
from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.checks import check_model
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.parallel.output import log
from scmoe_ds.replace.convert import convert, routed_experts_per_token
from scmoe_ds.replace.description import describe_replacement
from scmoe_ds.replace.first_pass import FirstPass
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.late_join import join_late
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.taps import Tap, find_tap
from scmoe_ds.replace.token_mask import TokenMask


def replace_moe_layers(model: nn.Module, config: Source | ScMoEConfig) -> nn.Module:
    """Makes every `deepspeed.moe.layer.MoE` of a model a ScMoE that reads a preceding layer, in place.

    The layers keep their paths and parameters, so that checkpoints of the model still load; what a plain MoE lacks
    (shared expert, coefficient, a norm for the shortcut) keeps its fresh values then. Call it before
    `deepspeed.initialize`; `scmoe_ds.initialize` does where the section says `"replace": true`.

    A model that takes an `attention_mask` [batch, sequence] is to be given whole: tokens that it masks are then routed
    to no expert.

    Args:
        model: any model whose blocks are members of an nn.ModuleList.
        config: a DeepSpeed JSON with a "scmoe" section (a path or a dict), or a ScMoEConfig. Sizes (experts, capacity)
            stay those of the layers.

    Returns:
        the same model.

    Raises:
        ScMoEConfigError: no MoE layer, or one that cannot be replaced; the model is then as it was.
    """
    check_model(model)
    config = ScMoEConfig.from_deepspeed(config)
    for field in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        if (width := getattr(config, field)) is not None:
            raise fail(f"scmoe.{field}", width, "replaced layers keep their experts; remove the field")
    log(*describe_replacement(model, replaced_layers(model, config)))
    return model


def replaced_layers(model: nn.Module, config: ScMoEConfig) -> list[HookedScMoE]:
    """As `replace_moe_layers`, without a word in the log; returns the layers that came into the model."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    _check(model, found, config)
    taps = []
    for index, (name, _) in enumerate(found):
        position = config.first_layer_position if index == 0 else None
        taps.append(find_tap(model, name, position or config.position, config))
    layers = [(convert(name, moe, config), routed_experts_per_token(moe, config)) for name, moe in found]
    token_mask = TokenMask(model, [name for name, _ in found])
    pairs = []
    for (name, moe), tap, (layer, top_k) in zip(found, taps, layers, strict=True):
        layer.replaced = (moe, moe.deepspeed_moe.gate.k)
        layer.deepspeed_moe.gate.k = top_k
        _put(model, moe, layer)
        layer.pair = HookedPair(name, layer, tap, _shortcut_norm(layer, tap, config), config.overlap)
        layer.pair.token_mask = token_mask
        pairs.append(layer.pair)
        layer.register_load_state_dict_pre_hook(_keep_fresh_values)
    if config.join == "late":
        try:
            join_late(model, pairs)
        except ScMoEConfigError:
            undo_replacement(model)
            raise
    first_pass = FirstPass(dict(enumerate(pairs)))
    for pair in pairs:
        pair.first_pass = first_pass
    return [layer for layer, _ in layers]


def undo_replacement(model: nn.Module) -> nn.Module:
    """Puts the replaced layers back, in place, with the weights that they have now, and removes all hooks.

    Args:
        model: what `replace_moe_layers` or `moe_from_dense` returned; any other model stays as it is.

    Returns:
        the same model.
    """
    check_model(model)
    for layer in [module for module in model.modules() if isinstance(module, HookedScMoE)]:
        assert layer.pair is not None
        layer.pair.detach()
        if layer.pair.token_mask is not None:
            layer.pair.token_mask.detach()
        moe, top_k = layer.replaced
        moe.deepspeed_moe.gate.k = top_k
        _put(model, layer, moe)
    return model


def is_replaced(model: nn.Module) -> bool:
    """Whether a model's layers have been replaced already."""
    return any(isinstance(module, HookedScMoE) for module in model.modules())


def nothing_to_apply_to(model: nn.Module) -> ScMoEConfigError:
    """The error about a model without a layer for the section: what was found, and what would serve."""
    foreign = Counter(type(module).__name__ for module in model.modules() if _looks_like_moe(module))
    others = "; ".join(f"{number} × {name}" for name, number in foreign.items())
    experts = 'Add "expert_parallel": {"enabled": true} for a Hugging Face MoE model. ' if others else ""
    return ScMoEConfigError(
        f'the "scmoe" section has nothing to apply to: {type(model).__name__} holds no MoE layer of DeepSpeed or '
        f"of scmoe_ds{f' ({others} are none)' if others else ''}. {experts}Build it with deepspeed.moe.layer.MoE "
        'and set "replace": true, make one of a dense model by scmoe_ds.moe_from_dense, '
        "or use scmoe_ds.ScMoE; to "
        "train the model as it is, call deepspeed.initialize"
    )


def _looks_like_moe(module: nn.Module) -> bool:
    """A MoE of somebody else's: routed experts below it, or it calls itself so."""
    return isinstance(getattr(module, "experts", None), nn.Module) or type(module).__name__.lower().endswith("moe")


def _check(model: nn.Module, found: list[tuple[str, Any]], config: ScMoEConfig) -> None:
    if not found:
        raise nothing_to_apply_to(model)
    if config.architecture != "scmoe" or config.post_norm or config.shortcut_distance != 1:
        raise ScMoEConfigError(
            'scmoe.replace makes layers of architecture "scmoe" with shortcut_distance 1 and '
            "without post_norm; remove what says otherwise"
        )
    for index, (name, layer) in enumerate(found):
        if isinstance(layer, HookedScMoE):
            raise ScMoEConfigError(f"{name} has been replaced already")
        if isinstance(layer, StagedMoE):
            raise ScMoEConfigError(f"scmoe.replace: {name} is a {type(layer).__name__} already; remove the field")
        asked = config.written | ({"num_experts": config.experts_of(index)} if "num_experts" in config.written else {})
        for field, value in (("num_experts", layer.num_experts), ("expert_parallel_size", layer.ep_size)):
            if asked.get(field, value) != value:
                raise ScMoEConfigError(
                    f"scmoe.{field} = {asked[field]}: {name} has {value}; a replaced layer keeps its own, remove the "
                    "field"
                )


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever a parent holds `old`, it holds `new` afterwards."""
    for parent in model.modules():
        for name, child in children_of(parent).items():
            if child is old:
                children_of(parent)[name] = new


def _shortcut_norm(layer: HookedScMoE, tap: Tap, config: ScMoEConfig) -> nn.Module | None:
    if tap.norm is None or config.shortcut_norm == "shared":
        return tap.norm
    norm = copy.deepcopy(tap.norm)
    for hooks in forward_hooks(norm):
        hooks.clear()
    for name, parameter in norm.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    layer.shortcut_norm = norm
    return norm


def _keep_fresh_values(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A checkpoint from before the replacement has no values for the parts that came with it."""
    for name, parameter in module.named_parameters():
        if not name.startswith("deepspeed_moe."):
            state.setdefault(prefix + name, parameter.detach())
