"""`attach`: the schedules of a model whose DeepSpeed engine exists."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import nn

from scmoe_ds.compat_transformers import accept_names_of_recorders
from scmoe_ds.config.deepspeed_gradients import check_norm
from scmoe_ds.config.deepspeed_json import section as json_section
from scmoe_ds.config.expert_parallel import autoep_size, idle_settings, uses_autoep
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.other_checkpoints import note_conversion, refuse_other_models
from scmoe_ds.engine.pairs import describe_pair, describe_schedules, pairs_of
from scmoe_ds.engine.routers import monitor_loads, serve_routers
from scmoe_ds.engine.stepwise import convert_stepwise
from scmoe_ds.engine.taught_model import teach_model
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.identity import identity
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import from_rank_zero, require_agreement
from scmoe_ds.parallel.groups import Layout, describe_groups, nodes_of_ranks
from scmoe_ds.parallel.output import log, steady_monitors
from scmoe_ds.parallel.process import device
from scmoe_ds.planner.auto import choose_all_to_all
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.schedule_text import names_text
from scmoe_ds.replace.origin import note_settings, remember
from scmoe_ds.replace.own_experts import check_loaded

UNKNOWN_SEQUENCE = 1024
"""Tokens of a sequence for the probe of the all-to-all, in a model that does not say how many it has."""


def prepare_autoep(model: nn.Module, whole: Mapping[str, Any], section: ScMoEConfig | None = None) -> None:
    """Before `deepspeed.initialize`, where the JSON has "expert_parallel": offers presets of ours, lets DeepSpeed and
    transformers go together, checks the model, and gives it the parameters that a ScMoE has more. Collective.

    Args:
        section: the JSON's "scmoe" section; None: the model keeps the parameters that it has.

    Raises:
        ScMoEConfigError: a model that AutoEP would not replace, or not rightly, or that cannot have what the section
            asks for.
    """
    from scmoe_ds.replace.adapted_parts import of_adapted, prepare_parts
    from scmoe_ds.replace.autoep_model import check_model_for_autoep  # AutoEP may be missing in this DeepSpeed
    from scmoe_ds.replace.presets import offer_presets

    check_norm(whole, autoep_size(whole), divided=False)
    accept_names_of_recorders()
    offer_presets()
    check_model_for_autoep(model, whole)
    if section is not None:
        whole, section = of_adapted(model, whole, section)
        prepare_parts(model, section, json_section(whole, "expert_parallel"))


def attach(engine: Any, whole: Mapping[str, Any], section: ScMoEConfig) -> Calibrator:
    """Puts the AutoEP layers of an engine's model under schedules. Collective; once, before the first forward pass.

    `scmoe_ds.initialize` does so. It is for those who call `deepspeed.initialize` otherwise, as Trainer does.

    Args:
        engine: DeepSpeed's.
        whole: the JSON that it was made from, with "expert_parallel".
        section: its "scmoe" section. Of a model of an adapted directory, what is left out is as it was adapted.

    Returns:
        the calibrator, which is `engine.overlap` from then on. `engine.conversion` says which layers run as ScMoE.

    Raises:
        ScMoEConfigError: nothing to schedule in the model, a setting that does not fit it, or a second call.
    """
    assert uses_autoep(whole)
    from scmoe_ds.replace.adapted_parts import of_adapted, settings_for_files
    from scmoe_ds.replace.autoep import ScheduledAutoEP, autoep_layers, schedule

    found = autoep_layers(engine.module)
    if not found:
        raise ScMoEConfigError(
            f"expert_parallel: AutoEP has found no MoE block in {type(engine.module).__name__}; remove the section, or "
            "name the blocks in expert_parallel.moe_layer_pattern"
        )
    if any(isinstance(layer, ScheduledAutoEP) for _, layer in found):
        raise ScMoEConfigError("attach: the engine's layers run under schedules already; attach once")
    check_loaded(engine.module, found[0][1].ep_size)
    remember(engine.module)
    whole, section = of_adapted(engine.module, whole, section)
    refuse_other_models(engine, section)
    note_settings(engine.module, settings_for_files(engine.module, section, [name for name, _ in found]))
    layers = [schedule(name, layer, section.wire_dtype, section.expert_partition) for name, layer in found]
    first = layers[0]
    give_pairs(engine.module, layers, section)
    engine.conversion = Conversion({number: each for number, each in enumerate(layers) if each.student is not None})
    note_conversion(engine)
    sizes = {"expert_parallel_size": first.ep_size, "num_experts": first.num_experts}
    shared = "with" if any(layer.shared_experts is not None for layer in layers) else "without"
    applied = (
        f'the "scmoe" section applies to {len(layers)} AutoEP layers ({names_text([name for name, _ in found])}), '
        f"{first.model_family}: {_experts_text(first)}, top-{first.top_k}, {shared} shared experts, "
        f'expert-parallel size {first.ep_size}, architecture "{section.architecture}"'
    )
    if idle := idle_settings(whole):
        log(f'no effect, the "scmoe" section moves the rows: {", ".join(idle)}', level=logging.WARNING)
    for_shortcuts = ("position", "merge", "shortcut_norm", "shortcut_distance", "tap")
    if unread := [f"scmoe.{field}" for field in for_shortcuts if field in section.written and not section.has_shortcut]:
        log(f'no effect on layers of architecture "as_is": {", ".join(unread)}', level=logging.WARNING)
    layout = Layout(dist.get_world_size(), 1, first.ep_size)
    section = section.model_copy(update=sizes)
    micro_batch_size = engine.train_micro_batch_size_per_gpu()
    monitor_loads(engine, layers)
    overlap = overlap_of(engine, section, layout, micro_batch_size, applied)
    teach_model(engine, engine.conversion, section)
    return overlap


def give_pairs(model: nn.Module, layers: list[Any], section: ScMoEConfig) -> None:
    """Every layer's pair, which runs its stages, and what the section adds to its router."""
    from scmoe_ds.replace.adapted_parts import converted_numbers
    from scmoe_ds.replace.as_is import AsIsPair
    from scmoe_ds.replace.autoep_router import extend_router
    from scmoe_ds.replace.autoep_shortcuts import connect_shortcuts
    from scmoe_ds.replace.longcat import FAMILY as LONGCAT

    for layer in layers:
        extend_router(layer, section.router)
    if layers[0].model_family == LONGCAT:
        from scmoe_ds.replace.longcat_pair import schedule_blocks  # needs transformers ≥ 5

        schedule_blocks(model, section)
        return
    paths = [layer.name for layer in layers]
    numbers = converted_numbers(section, len(layers))
    # A slot counts the operators behind the tap of a ScMoE.
    overlap = section.overlap.model_copy(update={"expert_slot": "auto"}) if numbers else section.overlap
    for layer in layers:
        layer.base = AsIsPair(layer, overlap)
    if numbers:
        chosen = {number: (paths[number], layers[number]) for number in numbers}
        log(*connect_shortcuts(model, chosen, section, paths))


def _experts_text(layer: Any) -> str:
    identity_experts = layer.router.num_experts - layer.num_experts
    return f"{layer.num_experts} experts" + (f" and {identity_experts} identity experts" if identity_experts else "")


def overlap_of(engine: Any, section: ScMoEConfig, layout: Layout, micro_batch_size: int, applied: str) -> Calibrator:
    """Makes `engine.overlap`: chooses the all-to-all, sets up the schedules of all pairs, says both in the log.
    Collective."""
    model: nn.Module = engine.module
    steady_monitors(engine.monitor)
    serve_routers(engine)
    pairs = pairs_of(model)
    for number, pair in enumerate(pairs):
        pair.layer.name = f"MoE layer {number}"
    sequence = getattr(model, "sequence", None)  # None in a model that others wrote
    nodes = nodes_of_ranks()
    log(*filter(None, [applied]), *(describe_groups(layout, nodes) if len(set(nodes)) > 1 else ()))
    # Chosen and logged at the start. Ranks that route the same tokens have to round them alike.
    kernels = sorted({str(kernels_of(parameter)) for parameter in filter(is_moe_param, model.parameters())})
    if tensor.tensor_parallel_size() > 1:
        remedy = "install the same packages and a C compiler on all nodes, and share layers among GPUs of one kind"
        require_agreement("the kernels of tensor-parallel ranks", kernels, tensor.tensor_parallel_group(), remedy)
    # Rank 0's wording for all: the decision to measure must not depend on a node's device.
    own = [describe_pair(pair, section, micro_batch_size, sequence, len(set(nodes))) for pair in pairs]
    choose_all_to_all(model, section.all_to_all, layout, micro_batch_size * (sequence or UNKNOWN_SEQUENCE))
    overlap = engine.overlap = Calibrator(
        pairs, section.overlap, device(), "train", from_rank_zero(lambda: own), identity=identity(model)
    )
    overlap.watch(model)
    log(*describe_schedules(pairs, model, overlap))
    conversion: Any = getattr(engine, "conversion", None) or getattr(model, "conversion", None) or Conversion({})
    convert_stepwise(engine, conversion, section)
    return overlap
