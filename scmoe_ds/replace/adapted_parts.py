"""What the "scmoe" section adds to a Hugging Face model, before DeepSpeed's AutoEP takes its MoE blocks away.

The parts are children of the decoder layers: AutoEP puts a layer of its own in the place of the MoE block.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.config.expert_parallel import PATH
from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel.output import log
from scmoe_ds.parallel.process import device
from scmoe_ds.replace import longcat
from scmoe_ds.replace.autoep_model import moe_specs
from scmoe_ds.replace.modeling_adapted import ShortcutParts, add_parts, blocks_of, moe_blocks
from scmoe_ds.replace.origin import settings_noted
from scmoe_ds.replace.own_experts import own_experts_of
from scmoe_ds.replace.surgery import mean_of, start_parts


def settings_of(section: ScMoEConfig) -> dict[str, Any]:
    """What a converted model computes, as the "scmoe" object of its config.json has it (see `modeling_adapted`)."""
    fields = ("position", "first_layer_position", "join", "merge", "shortcut_norm")
    layers, shared = (None, None) if section.adapt is None else (section.adapt.layers, section.adapt.shared_expert)
    return {
        **{name: getattr(section, name) for name in fields},
        "top_k": section.top_k if "top_k" in section.written else None,
        "adapt": {"layers": layers, "shared_expert": shared},
    }


def settings_for_files(model: nn.Module, section: ScMoEConfig, layers: Sequence[str]) -> dict[str, Any] | None:
    """The same, if one file with the model's class can compute it; None: hooks of this package alone can, and the log
    says so.

    Args:
        layers: paths of the MoE layers that AutoEP has found, which the section numbers.

    Raises:
        ScMoEConfigError: a model of an adapted directory, whose numbers are of other layers.
    """
    if section.architecture != "scmoe":
        return None
    unsaid = _not_for_files(model, section, layers)
    if unsaid is None:
        return settings_of(section)
    log(
        f"{unsaid}: save_pretrained and scmoe convert export will write the class of the source, which computes "
        "without shortcuts",
        level=logging.WARNING,
    )
    return None


def _not_for_files(model: nn.Module, section: ScMoEConfig, layers: Sequence[str]) -> str | None:
    """Why no file with the model's class can compute it; None: one can."""
    if section.tap is not None:
        return "scmoe.tap is a place that no file of a model has"
    try:
        every = _paths_of(blocks_of(model))
    except ValueError as error:
        return str(error)
    if list(layers) == every:
        return None
    if settings_noted(model) is not None:
        rule = "leaves out MoE layers of a model that was adapted with all of them numbered; remove it"
        raise ScMoEConfigError(f"{PATH}.moe_layer_pattern: {rule}")
    return f"{PATH}.moe_layer_pattern leaves out MoE layers, which a file would number, too"


def _paths_of(blocks: list[tuple[str, Any]]) -> list[str]:
    """Of their MoE layers."""
    return [f"{name}.mlp" for name, _ in moe_blocks(blocks)]


def settings_now(settings: Mapping[str, Any] | None, conversion: Conversion | None) -> Mapping[str, Any] | None:
    """Settings with the layers that are converted now."""
    if settings is None or conversion is None or conversion.converted == conversion.numbers:
        return settings
    return {**settings, "adapt": {**settings["adapt"], "layers": conversion.converted}}


def as_adapted(whole: Mapping[str, Any], scmoe: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A JSON whose section has all that a model was adapted with.

    Args:
        whole: as the user wrote it.
        scmoe: see `settings_of`.
        what: the model or its directory, for the error.

    Raises:
        ScMoEConfigError: a field that says otherwise.
    """
    own, given = {"architecture": "scmoe", **scmoe}, dict(whole.get("scmoe") or {})
    own_adapt, adapt = own.pop("adapt", None) or {}, dict(given.get("adapt") or {})

    def differ(field: str, value: object, known: object) -> ScMoEConfigError:
        return fail(f"scmoe.{field}", value, f"{what} was adapted with {json.dumps(known)}; set that, or remove it")

    for field, known in own.items():
        if given.get(field) not in (None, "auto", known):
            raise differ(field, given[field], known)
    layers, known_layers = adapt.get("layers"), own_adapt.get("layers")
    if layers is not None and (known_layers is None or sorted(layers) != sorted(known_layers)):
        raise differ("adapt.layers", layers, known_layers)
    shared = own_adapt.get("shared_expert") or "none"
    if adapt.get("shared_expert") not in (None, shared):
        raise differ("adapt.shared_expert", adapt["shared_expert"], shared)
    adapt |= {"layers": known_layers if layers is None else layers, "shared_expert": shared}
    known = {name: value for name, value in own.items() if value is not None}
    return {**whole, "scmoe": {**given, **known, "adapt": adapt}}


def of_adapted(
    model: nn.Module, whole: Mapping[str, Any], section: ScMoEConfig
) -> tuple[Mapping[str, Any], ScMoEConfig]:
    """A JSON and its section; for a model of an adapted directory, with what it was adapted with.

    Raises:
        ScMoEConfigError: a field that says otherwise.
    """
    settings = settings_noted(model)
    if settings is None:
        return whole, section
    whole = as_adapted(whole, settings, type(model).__name__)
    return whole, ScMoEConfig.from_deepspeed(whole)


def converted_numbers(section: ScMoEConfig, count: int) -> list[int]:
    """The MoE layers that the section converts, of so many.

    Raises:
        ScMoEConfigError: a layer that the model does not have.
    """
    if section.architecture != "scmoe":
        return []
    layers = None if section.adapt is None else section.adapt.layers
    if layers is not None and max(layers, default=0) >= count:
        raise fail("scmoe.adapt.layers", layers, f"the model has {count} MoE layers, which are numbered from 0")
    return list(range(count)) if layers is None else sorted(layers)


def has_parts(section: ScMoEConfig) -> bool:
    """Whether the section's ScMoE has parameters that its source has not."""
    added = section.adapt is not None and section.adapt.shared_expert not in (None, "none")
    return section.architecture == "scmoe" and (added or section.merge != "add" or section.shortcut_norm == "own")


def prepare_parts(model: nn.Module, section: ScMoEConfig, expert_parallel: Mapping[str, Any]) -> None:
    """Gives the decoder layers of converted MoE layers their `shortcut`. One that is there already stays as it is.

    The norm starts as a copy, an added shared expert as the mean of the routed ones, see `replace.surgery`. Where ranks
    hold their own experts alone, the mean is that of all. Collective.

    Raises:
        ScMoEConfigError: what the model cannot have, or parts that are there and differ from the section.
    """
    if not has_parts(section):
        return
    specs = moe_specs(model, expert_parallel)
    if specs[0].model_family == longcat.FAMILY:  # it has shortcuts, as `schedule_blocks` says
        return
    numbers = converted_numbers(section, len(specs))
    if section.tap is not None and section.shortcut_norm == "own":
        raise fail("scmoe.shortcut_norm", "own", 'copies the norm of the position; with scmoe.tap, use "shared"')
    _require_whole_weights(model)
    there = {id(module) for module in model.modules() if isinstance(module, ShortcutParts)}
    try:
        if [spec.moe_module_name for spec in specs] != _paths_of(blocks_of(model)):
            raise ValueError(
                "AutoEP takes other MoE layers than the model has; remove expert_parallel.moe_layer_pattern, or "
                'let the section add no parameters ("shortcut_norm": "shared", "merge": "add")'
            )
        parts = add_parts(model, settings_of(section))
    except ValueError as error:
        raise ScMoEConfigError(f"scmoe: {error}") from None
    kind = None if section.adapt is None else section.adapt.shared_expert
    for number in numbers:
        if id(parts[number]) not in there:
            start_parts(parts[number], section.merge, partial(_expert, model, specs[number], kind))


def check_parts(name: str, parts: ShortcutParts | None, section: ScMoEConfig, has_shared: bool) -> None:
    """Compares what a decoder layer has with the section.

    Args:
        name: path of its MoE layer.
        has_shared: whether the source has a shared expert.

    Raises:
        ScMoEConfigError: a part that the section asks for is missing, or another one is there.
    """
    kind = None if section.adapt is None else section.adapt.shared_expert
    rows = getattr(getattr(parts, "coefficient", None), "out_features", 0)
    has = {
        "shortcut_norm": "own" if getattr(parts, "norm", None) is not None else "shared",
        "merge": ("add", "cg1", "cg2")[rows],
    }
    asked: dict[str, str] = {"shortcut_norm": section.shortcut_norm, "merge": section.merge}
    for field, value in asked.items():
        if has[field] != value:
            rule = f'the block of {name} has parts for "{has[field]}"; set that, or let scmoe_ds.initialize add them'
            raise fail(f"scmoe.{field}", value, rule)
    is_added = getattr(parts, "shared_expert", None) is not None
    if is_added != (kind not in (None, "none")):
        rule = f"the block of {name} has {'an' if is_added else 'no'} added shared expert; set what it has"
        raise fail("scmoe.adapt.shared_expert", kind, rule)
    if section.merge != "add" and not (is_added or has_shared):
        rule = f'{name} has no shared expert to weigh; use "add", or set scmoe.adapt.shared_expert'
        raise fail("scmoe.merge", section.merge, rule)


def _require_whole_weights(model: nn.Module) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ScMoEConfigError(
            "scmoe.adapt: surgery needs whole weights, and the model was made under deepspeed.zero.Init; load it by "
            "scmoe_ds.from_pretrained, of which a rank holds its own experts alone"
        )


def _expert(model: nn.Module, spec: Any, kind: str | None) -> tuple[Tensor, Tensor]:
    """gate_up [2F, D] and down [D, F] of an added shared expert."""
    if kind != "mean":
        rule = 'is measured on text; let "scmoe adapt" convert the model, or use "mean"'
        raise fail("scmoe.adapt.shared_expert", kind, rule)
    path = f"{spec.moe_module_name}.{spec.experts_name}"
    if spec.expert_storage != "fused_3d" or spec.expert_w3_name is not None or spec.expert_activation != "swiglu":
        rule = f"the experts of {path} are no fused SwiGLU MLPs, of which one could be made; use none"
        raise fail("scmoe.adapt.shared_expert", kind, rule)
    with torch.no_grad():
        gate_up, down = (
            _mean(model, model.get_parameter(f"{path}.{name}")[: spec.num_experts])
            for name in (spec.expert_w1_name, spec.expert_w2_name)
        )
    is_hidden_first = gate_up.shape[1] == 2 * down.shape[0]
    return (gate_up.t(), down.t()) if is_hidden_first else (gate_up, down)


def _mean(model: nn.Module, weights: Tensor) -> Tensor:
    """Over all experts; their sum over ranks, where each holds its own."""
    own = own_experts_of(model)
    if own is None or own.ep_size == 1:
        return mean_of(weights)
    count, copies = len(weights) // own.ep_size, dist.get_world_size() // own.ep_size

    def added_up(found: Tensor) -> Tensor:
        there = found.to(device())
        dist.all_reduce(there)
        return there.to(found.device)

    return mean_of(weights.narrow(0, own.ep_rank * count, count), added_up, of=len(weights) * copies)
