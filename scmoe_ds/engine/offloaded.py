"""Experts of a model out of the device's memory in training, and their part in the steps of DeepSpeed's ZeRO-1.

ZeRO-1 keeps gradient norm, clipping and learning rates. It sees one stand-in for all experts of an optimizer group:

    norm of a group      its own sum over the norms of the experts' gradients, in the order of the experts in memory
    clipping             the factor that it multiplies its own gradients by
    step                 the options of the stand-in's group; the experts make the step when they are fetched
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from scmoe_ds.config.deepspeed_json import is_on
from scmoe_ds.config.offload_section import OffloadConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.experts import initialize_late
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.offload.own_checkpoints import refuse_deepspeeds_own
from scmoe_ds.offload.pages import page_tensor
from scmoe_ds.offload.records import FileRecords, HostRecords, Records
from scmoe_ds.offload.room import sections
from scmoe_ds.offload.shape import ExpertShape
from scmoe_ds.offload.shared import SharedStates, keepers
from scmoe_ds.offload.states import MASTER, ExpertStates
from scmoe_ds.offload.store import ExpertKey, ExpertStore
from scmoe_ds.offload.trainable import Slot, TrainableExperts, offloaded, shape_of
from scmoe_ds.parallel.output import log

_PATH = "scmoe.offload_experts"


def offload_experts(model: nn.Module, settings: OffloadConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Moves the experts of all MoE layers out of the device's memory; a model whose experts are there stays as it is.

    Args:
        model: its experts may be on the meta device: they are then filled one after another, by `value_of` of their
            container or by themselves.
        settings: where to.
        dtype: of the parameters in training.
        device: that trains.

    Raises:
        ScMoEConfigError: experts of another form than output(activate(input(x))), or of different shapes.
        ArgumentError: no room.
    """
    layers = [module for module in model.modules() if isinstance(module, StagedMoE)]
    if not layers or offloaded(model):
        return
    shape = _shape(layers)
    keys = [ExpertKey(number, each) for number, layer in enumerate(layers) for each in range(layer.num_local_experts)]
    states = _states(keys, shape, dtype, device, settings, layers[0].ep_size)
    slots = [Slot(page_tensor(shape.elements, dtype, device)) for _ in range(min(settings.buffer_count, len(keys)))]
    store = ExpertStore(states, lambda key: {"flat": f"{key.layer}.{key.expert}"}, slots)
    for number, layer in enumerate(layers):
        _move(layer, number, store, states, dtype)
    where = "the host's memory" if settings.device == "cpu" else settings.nvme_path
    log(
        f"{_PATH}: {len(keys)} experts and the optimizer states of {len(states.kept)}, "
        f"{states.records.nbytes / 1e9:.2f} GB, are in {where}; "
        f"{(store.nbytes + states.nbytes) / 1e9:.2f} GB of the device move them"
    )


def _states(
    keys: Sequence[ExpertKey],
    shape: ExpertShape,
    dtype: torch.dtype,
    device: torch.device,
    settings: OffloadConfig,
    expert_parallel_size: int,
) -> ExpertStates:
    """The states of this rank's experts, or its share of them. No process groups exist yet: every
    `expert_parallel_size`-th rank of the world will be in one of DeepSpeed's expert-data-parallel groups."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place, size = rank // expert_parallel_size, ranks // expert_parallel_size
    each = [sections(shape, dtype, keeper == place) for keeper in keepers(keys, size).values()]
    records: Records
    if settings.device == "nvme":
        assert settings.nvme_path is not None  # a rule of the section
        records = FileRecords(settings.nvme_path, each, device)
    else:
        records = HostRecords(each, device)
    if size == 1:
        return ExpertStates(keys, shape, dtype, device, records)
    return SharedStates(keys, shape, dtype, device, records, place, size)


def _shape(layers: Sequence[StagedMoE]) -> ExpertShape:
    found = {shape_of(expert) for layer in layers for expert in layer.deepspeed_moe.experts.deepspeed_experts}
    if None in found:
        raise ScMoEConfigError(
            f"{_PATH}: experts must compute output(activate(input(x))) and say so by two_projections = True, with two "
            "torch.nn.Linear that are trained and without hooks; remove the setting for other experts"
        )
    if len(found) > 1:
        raise ScMoEConfigError(f"{_PATH}: experts of different shapes cannot share their places; remove the setting")
    (shape,) = found
    assert shape is not None
    return shape


def _move(layer: StagedMoE, number: int, store: ExpertStore, states: ExpertStates, dtype: torch.dtype) -> None:
    """One expert after another: at no time is a layer there twice."""
    there, group_name = layer.deepspeed_moe.experts, layer.expert_group_name
    members = there.deepspeed_experts
    experts = TrainableExperts(store, states, number, len(members), members[0].activate, group_name)
    value_of = getattr(there, "value_of", None)  # of experts that have never been in memory
    for key, member in zip(experts.members(), members, strict=True):
        if value_of is None and any(each.is_meta for each in member.parameters()):
            initialize_late(there, key.expert)
        values = {}
        for name, each in member.named_parameters():
            value = value_of(key.expert, name, each) if value_of is not None and each.is_meta else each.detach()
            values[name] = {MASTER: value.to(dtype).float()}
        states.write(key, values)
        member.to("meta")
    layer.deepspeed_moe.experts = experts


def parameter_dtype(whole: Mapping[str, Any]) -> torch.dtype:
    """Of the parameters in training, as a DeepSpeed JSON says that is allowed beside offloaded experts."""
    return torch.bfloat16 if is_on(whole, "bf16.enabled") or is_on(whole, "bfloat16.enabled") else torch.float32


def check_own_optimizer(optimizer: Any, model_parameters: Any) -> None:
    """
    Raises:
        ScMoEConfigError: something was handed over that may hold experts.
    """
    for name, given in (("optimizer", optimizer), ("model_parameters", model_parameters)):
        if given is not None:
            raise ScMoEConfigError(
                f"{name}: was handed over beside {_PATH}, whose experts are nobody's parameters; leave it out, and "
                'name the optimizer in the "optimizer" section of the DeepSpeed JSON'
            )


def join_steps(engine: Any) -> None:
    """Lets offloaded experts make the steps of an engine's optimizer.

    Raises:
        ScMoEConfigError: an optimizer whose steps they cannot make.
    """
    if not (layers := offloaded(engine.module)):
        return
    optimizer, states = engine.optimizer, layers[0].states
    _check(optimizer, states)
    states.join(engine.dp_world_size, optimizer.expert_dp_process_group[layers[0].group_name])
    _Joined(optimizer, layers, layers[0].store, states).join(engine)
    refuse_deepspeeds_own(engine)


def _check(optimizer: Any, states: ExpertStates) -> None:
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.gradient_accumulation_dtype != states.dtype:
        raise ScMoEConfigError(
            f"{_PATH}: DeepSpeed adds gradients up in another dtype than the parameters'; set "
            "zero_optimization.stage to 1 or 2 and remove data_types.grad_accum_dtype"
        )
    inner = optimizer.optimizer
    if type(inner) not in (torch.optim.Adam, torch.optim.AdamW):
        raise ScMoEConfigError(
            f"optimizer.type: the engine has {type(inner).__name__}; beside {_PATH} name Adam or AdamW with "
            '"torch_adam": true'
        )
    if any(group.get("amsgrad") for group in inner.param_groups):
        raise ScMoEConfigError(f"optimizer.params.amsgrad = True: experts have two moments beside {_PATH}; remove it")


class _Joined:
    """Experts in the steps of an optimizer, of whose methods it takes the place."""

    def __init__(
        self, optimizer: Any, layers: Sequence[TrainableExperts], store: ExpertStore, states: ExpertStates
    ) -> None:
        self._optimizer, self._inner, self._store, self._states = optimizer, optimizer.optimizer, store, states
        stand_ins = {id(each): group for layer in layers for group, each in layer.stand_ins.items()}
        self._number_of = {
            stand_ins[id(parameter)]: number
            for number, members in enumerate(optimizer.bit16_groups)
            for parameter in members
            if id(parameter) in stand_ins
        }
        self._factor: Tensor | None = None
        self._norm, self._clip = optimizer.get_grad_norm_direct, optimizer.unscale_and_clip_grads
        self._step = optimizer.step

    def join(self, engine: Any) -> None:
        """From here on the experts make an engine's steps, and lose the gradients that the model loses."""
        optimizer = self._optimizer
        optimizer.get_grad_norm_direct, optimizer.unscale_and_clip_grads = self.norm, self.clip
        optimizer.step = self.step
        for each in (optimizer, engine, engine.module):
            each.zero_grad = self._zeroing(each.zero_grad)

    def _zeroing(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        def zero(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            # Gradients that ZeRO has elsewhere are in its step all the same: under ZeRO-1 from the last micro-batch on,
            # under ZeRO-2 from the first.
            there = (self._optimizer.averaged_gradients, self._optimizer.all_grad_tensors)
            if not any(each is not None for gradients in there for each in gradients.values()):
                self._states.forget_gradients()

        return zero

    def norm(self, gradients: Any, params: Any, norm_type: Any = 2) -> Tensor:
        """Of a group. The norm of a norm is itself, so that ZeRO's own sum over parameters takes the experts' norms."""
        for group, number in self._number_of.items():
            if gradients is self._optimizer.averaged_gradients[number]:
                gradients = [each.view(1) for each in self._states.norms(group)]
                params = self._optimizer.bit16_groups[number][:1] * len(gradients)
        found: Tensor = self._norm(gradients, params, norm_type)
        return found

    def clip(self, gradients: Sequence[Any], total_norm: Any) -> None:
        """Clips a group's gradients, and notes by what factor."""
        if self._factor is None:
            self._factor = torch.ones(1, device=self._states.device)
            self._clip([self._factor], total_norm)
        self._clip(gradients, total_norm)

    def step(self, closure: Any = None) -> None:
        """The step of the dense parameters; the experts have theirs before them from then on."""
        self._factor = None
        self._states.reduce()
        self._step(closure)
        if self._factor is None or self._optimizer.overflow:
            self._states.forget_gradients()
            return
        options = {
            group: {name: value for name, value in self._inner.param_groups[number].items() if name != "params"}
            for group, number in self._number_of.items()
        }
        self._states.step(self._factor, type(self._inner), options)
        self._store.renew(list(self._states.kept))
