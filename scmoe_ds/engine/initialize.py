"""`initialize`: a DeepSpeed engine for a model with ScMoE layers, from a JSON that has a "scmoe" section."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from scmoe_ds.compat import allow_frozen_experts
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.deepspeed_gradients import check_norm, check_output
from scmoe_ds.config.deepspeed_json import load_deepspeed_json
from scmoe_ds.config.deepspeed_settings import (
    check_accelerator,
    check_filled_in,
    check_model_and_optimizer,
    check_trainable,
    warn,
)
from scmoe_ds.config.expert_parallel import uses_autoep
from scmoe_ds.config.loading import LoadedConfig, Source
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.config.unread_section import section_is_read
from scmoe_ds.engine.attach import attach, overlap_of, prepare_autoep
from scmoe_ds.engine.client_optimizer import add_new_parameters, after_replacement, in_groups, listed, trainable
from scmoe_ds.engine.deepspeed_errors import errors_name_the_section
from scmoe_ds.engine.offloaded import check_own_optimizer, join_steps, offload_experts, parameter_dtype
from scmoe_ds.engine.pairs import applied_to
from scmoe_ds.engine.whole_experts import prepare_whole_experts
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import fingerprint, require_agreement
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.output import log, show_by_default, without_full_disks
from scmoe_ds.parallel.process import connect, device
from scmoe_ds.replace.replacement import is_replaced, replace_moe_layers


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Source | None = None,
    mesh_param: Any = None,
    config_params: Source | None = None,
) -> tuple[Any, Any, Any, Any]:
    """As `deepspeed.initialize`, with the same arguments, for models with ScMoE layers.

    Args:
        args: may name the JSON as `args.deepspeed_config`.
        model: has its parameters; expert-parallel layers were built after `scmoe_ds.connect()`.
        optimizer, model_parameters: as for DeepSpeed. By default all parameters that require a gradient, in
            `parameter_groups`. Experts get groups of their own. What `"replace": true` adds joins its like's group.
        training_data, lr_scheduler, distributed_port, dist_init_required, collate_fn, mesh_param: as for DeepSpeed.
        mpu: as for DeepSpeed; default: the groups of scmoe_ds.parallel.tensor, if it was started.
        config, config_params: the DeepSpeed JSON with its "scmoe" section: a path, a dict, or a valid `LoadedConfig`.

    Returns:
        engine, optimizer, data loader, learning-rate scheduler. `engine.overlap` (a Calibrator) times the first
        micro-batches and sets the schedules. Save its `state()` in your checkpoints, and give it to `resume()`.

    Raises:
        ScMoEConfigError: a setting that its user can correct, or a section that applies to nothing in the model.
        RankDisagreementError: the ranks hold different JSON files.
    """
    show_by_default()
    model = _module(model)
    whole, section = _agreed(_json_of(args, config, config_params))
    model_parameters = listed(model_parameters)
    _check(whole, section, model, optimizer, model_parameters)
    mpu = _model_parallel_unit(mpu)
    handed_on = (training_data, lr_scheduler, distributed_port, mpu, dist_init_required, collate_fn)
    own = [name for name, each in (("optimizer", optimizer), ("scheduler", lr_scheduler)) if each is not None]
    sources = (_on_this_rank(whole, own), mesh_param)

    def start(optimizer: Any, model_parameters: Any) -> tuple[Any, Any, Any, Any]:
        check_trainable(whole, model, own)
        with section_is_read(), errors_name_the_section(whole, own):
            result = deepspeed.initialize(_without_json(args), model, optimizer, model_parameters, *handed_on, *sources)
        _complete(result[0])
        return result

    if uses_autoep(whole):
        result = start(after_replacement(optimizer, lr_scheduler), trainable(model, model_parameters))
        attach(result[0], whole, section)
        return result
    applied, section, layout = _prepare(model, whole, section, mpu, optimizer, model_parameters)
    micro_batch_size, _ = batch_sizes(whole, layout.ranks // layout.tensor_size)
    result = start(*in_groups(model, optimizer, model_parameters, lr_scheduler))
    overlap_of(result[0], section, layout, micro_batch_size, applied)
    return result


def _complete(engine: Any) -> None:
    engine.module.register_forward_hook(check_output)
    join_steps(engine)


def _prepare(
    model: nn.Module, whole: Mapping[str, Any], section: ScMoEConfig, mpu: Any, optimizer: Any, model_parameters: Any
) -> tuple[str, ScMoEConfig, Layout]:
    """The model's layers as the section says: what it applies to in words, the section with their sizes, and who shares
    them."""
    section = section.over_tensor_parallel(bwc_tensor_model_parallel_world_size(mpu))
    if section.replace and not is_replaced(model):
        with _new_parameters_in(model, getattr(optimizer, "param_groups", None), model_parameters):
            replace_moe_layers(model, section)
    applied, section = applied_to(model, section)
    layout = _checked_layout(whole, section, mpu)
    if layout.tensor_size > 1 and not layout.divided_experts:
        prepare_whole_experts(model, section)
    if section.offload_experts is not None:
        check_own_optimizer(optimizer, model_parameters)
        offload_experts(model, section.offload_experts, parameter_dtype(whole), device())
    return applied, section, layout


def _check(
    whole: Mapping[str, Any], section: ScMoEConfig, model: nn.Module, optimizer: Any, model_parameters: Any
) -> None:
    check_filled_in(whole)
    check_accelerator(whole)
    check_model_and_optimizer(whole, model, optimizer)
    allow_frozen_experts()
    if uses_autoep(whole):
        with _new_parameters_in(model, getattr(optimizer, "param_groups", None), model_parameters):
            prepare_autoep(model, whole, section)


def _module(model: Any) -> nn.Module:
    if isinstance(model, deepspeed.DeepSpeedEngine):
        raise ScMoEConfigError(
            "model is a DeepSpeed engine already: hand over engine.module, or use the engine as it is"
        )
    if not isinstance(model, nn.Module):
        raise ScMoEConfigError(
            "scmoe_ds.initialize takes the arguments of deepspeed.initialize, in its order: hand over model=… and "
            "config=… by name"
        )
    return model


def _agreed(source: Source) -> tuple[Mapping[str, Any], ScMoEConfig]:
    """The valid JSON and its section. Ranks compare their files before one of them may find its own wrong."""
    whole = source.whole if isinstance(source, LoadedConfig) else load_deepspeed_json(source)
    connect()
    require_agreement("the DeepSpeed JSON", fingerprint(whole))
    return whole, ScMoEConfig.from_deepspeed(source if isinstance(source, LoadedConfig) else whole)


def _model_parallel_unit(mpu: Any) -> Any:
    if mpu is None and tensor.tensor_parallel_size() > 1:
        mpu = tensor.ModelParallelUnit()
    if mpu is not None:
        groups.mpu = mpu  # DeepSpeed's engine does so too; layers that are replaced have to know it before
    return mpu


def _checked_layout(whole: Mapping[str, Any], section: ScMoEConfig, mpu: Any) -> Layout:
    ranks, tp_size = dist.get_world_size(), bwc_tensor_model_parallel_world_size(mpu)
    section.check_world(ranks, tp_size)
    check_norm(whole, section.expert_parallel_size, section.expert_tensor_parallelism and tp_size > 1)
    return Layout(ranks, tp_size, section.expert_parallel_size, bool(section.expert_tensor_parallelism))


def _on_this_rank(whole: Mapping[str, Any], own: Sequence[str]) -> dict[str, Any]:
    """The JSON for DeepSpeed. Rank 0 alone warns, and writes to monitors.

    Args:
        own: sections in whose place something was handed over.
    """
    if dist.get_rank() > 0:
        return dict(whole)
    warn(whole)
    if twice := [name for name in own if whole.get(name)]:
        log(
            f"{', '.join(twice)} of the DeepSpeed JSON: not used, because initialize got its own; remove one of them",
            level=logging.WARNING,
        )
    return without_full_disks(whole)


@contextmanager
def _new_parameters_in(model: nn.Module, *handed_over: Any) -> Iterator[None]:
    """Parameters that the model gets within the block come into the lists of parameters or groups that the user has
    handed over."""
    old = {id(parameter) for parameter in model.parameters()}
    yield
    for given in handed_over:
        if isinstance(given, list):
            add_new_parameters(given, model, old)


def _without_json(args: Any) -> Any:
    """DeepSpeed accepts one source of its JSON, which `initialize` has read already."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def _json_of(args: Any, config: Any, config_params: Any) -> Any:
    """The one DeepSpeed JSON that `initialize` was given, under any of DeepSpeed's three names for it."""
    named = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) != 1:
        raise ScMoEConfigError(
            f"scmoe_ds.initialize got {' and '.join(given) or 'no DeepSpeed JSON'}: give it one of {', '.join(named)}"
        )
    return next(iter(given.values()))
