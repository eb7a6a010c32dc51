"""`save_pretrained`: a running engine's weights as a Hugging Face directory, all experts of all ranks."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from safetensors import SafetensorError
from torch import Tensor, nn

from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.autoep.blueprint import Block, Blueprint, State
from scmoe_ds.checkpoint.autoep.shards import OTHERS, Shard, Unit
from scmoe_ds.checkpoint.whole_model import save_whole_model
from scmoe_ds.compat_transformers import use_conversions
from scmoe_ds.errors import CheckpointError, reason_of
from scmoe_ds.parallel.agreement import from_rank_zero, gather, run_on_rank_zero, run_together
from scmoe_ds.replace.adapted_parts import settings_now
from scmoe_ds.replace.modeling_adapted import add_parts
from scmoe_ds.replace.origin import Origin, is_converted, origin_of


def save_pretrained(engine: Any, directory: str | os.PathLike[str], shard_bytes: int = 5 * 10**9) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` reads: the weights as the model computes with them.

    Of a model with DeepSpeed MoE or ScMoE layers, which transformers has no class for, it writes the same files, with
    the experts under global numbers: `load_state_dict` of a model on one rank takes them.

    Of a model with converted layers it writes config.json and the file of classes of an adapted directory.

    Every expert-parallel rank writes its own experts, rank 0 all other weights. No rank holds more than a shard beside
    its model. The directory gets its name when all ranks' files are on the disk. Collective: all ranks call it, with
    the same directory, which all of them must see.

    Args:
        engine: of `scmoe_ds.initialize` or `deepspeed.initialize`, with AutoEP layers under ZeRO-0 to 3, or with
            DeepSpeed MoE or ScMoE layers.
        directory: empty, or it does not exist.
        shard_bytes: most bytes of a file; a larger unit gets its own.

    Raises:
        CheckpointError: on every rank: the model has no MoE layers, the directory is not empty, or a rank cannot write.
    """
    out = Path(directory)
    if any(isinstance(module, MoE) for module in engine.module.modules()):
        save_whole_model(engine, out, shard_bytes)
        return
    weights = Running(engine)
    note = origin_of(engine.module)
    note = {**note, "scmoe": settings_now(note.get("scmoe"), getattr(engine, "conversion", None))}
    blueprint = _blueprint(engine, note)
    most = shard_bytes // weights.dtype.itemsize
    laid_out = shards.lay_out(_by_owner(shards.units_of(blueprint, weights.ep_size, most)), most)
    part = from_rank_zero(lambda: shards.claim(out))
    failures: list[str] = []
    total = 0
    for shard in laid_out:
        if shard.owner in (OTHERS, weights.ep_rank):
            total += _write(shard, part, weights, blueprint, failures)
    with shards.one_sentence(out):
        run_together(lambda: _raise(failures))
        total = sum(gather(total))
        run_on_rank_zero(lambda: _finish(engine.module, blueprint, note, weights, laid_out, part, out, total))


def _blueprint(engine: Any, note: Origin) -> Blueprint:
    model = engine.module
    with torch.device("meta"):
        empty = type(model)(model.config)
        if is_converted(note):
            add_parts(empty, note["scmoe"])
    use_conversions(empty, note["conversions"])
    return Blueprint(empty, engine.config["expert_parallel"])


def _by_owner(units: Iterable[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: -1 if unit.owner is None else unit.owner)  # stable


def _write(shard: Shard, part: Path, weights: Running, blueprint: Blueprint, failures: list[str]) -> int:
    """A rank's share of a shard. A rank that cannot write goes on reading, because others gather with it."""
    writes = weights.writes(shard) and not failures
    units = [unit for unit in shard.units if writes or weights.needs_all(unit)]
    states = (shards.read_unit(unit, weights, blueprint) for unit in units)
    if not writes:
        deque(states, maxlen=0)
        return 0
    try:
        return shards.write_shard(shard, part, states)
    except (OSError, SafetensorError) as error:  # when all have been read
        failures.append(f"{shard.name}: {reason_of(error)}")
        return 0


def _raise(failures: list[str]) -> None:
    if failures:
        raise OSError(failures[0])


def _finish(
    model: Any,
    blueprint: Blueprint,
    note: Origin,
    weights: Running,
    laid_out: list[Shard],
    part: Path,
    out: Path,
    total: int,
) -> None:
    shards.write_index(laid_out, part, total)
    shards.write_others(part, note, blueprint.model, weights.dtype, weights.config)
    if model.can_generate():
        model.generation_config.save_pretrained(part)
    shards.publish(part, out)


class Running:
    """The weights of an engine's model; see `shards.Weights`."""

    def __init__(self, engine: Any) -> None:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        self.config = engine.config
        self._layers = {
            name: module for name, module in engine.module.named_modules() if isinstance(module, AutoEPMoELayer)
        }
        if not self._layers:
            raise CheckpointError(
                f"{type(engine.module).__name__} has no AutoEP layers; save it with its own save_pretrained"
            )
        layer = next(iter(self._layers.values()))
        self.ep_size, self.ep_rank, self._group = layer.ep_size, layer.ep_rank, layer.ep_group
        self.dtype = layer.router.gate.weight.dtype
        first = {rank: number for number, rank in reversed(list(enumerate(gather(self.ep_rank))))}
        self._writes_experts = first[self.ep_rank] == dist.get_rank()
        self._held = dict(engine.module.named_parameters(remove_duplicate=False))
        self._held |= dict(engine.module.named_buffers())
        self._is_partitioned = hasattr(layer.router.gate.weight, "ds_id")

    def writes(self, shard: Shard) -> bool:
        return dist.get_rank() == 0 if shard.owner is OTHERS else self._writes_experts

    def needs_all(self, unit: Unit) -> bool:
        """Whether ranks communicate when they read a unit."""
        is_fused = unit.owner is OTHERS and unit.count > 0 and self.ep_size > 1
        return is_fused or (self._is_partitioned and (unit.block is None or unit.count > 0))

    def others(self, names: Iterable[str]) -> State:
        names = list(names)
        if lost := [name for name in names if name not in self._held]:
            raise CheckpointError(f"the model has no {lost[0]}; save it with its own save_pretrained")
        with self._whole([self._held[name] for name in names]):
            return {name: self._held[name].detach().clone() for name in names}

    def experts(self, block: Block, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        held = self._layers[block.path].experts
        own = block.num_experts // self.ep_size
        parameters = [held.w1, held.w2, held.w3]
        with self._whole(parameters):
            if count == own * self.ep_size and self.ep_size > 1:
                found = [self._gathered(parameter.detach()) for parameter in parameters]
            else:
                found = [p.detach()[first - self.ep_rank * own :][:count].clone() for p in parameters]
        return found[0], found[1], found[2]

    def _gathered(self, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(self.ep_size)]
        dist.all_gather(parts, own.contiguous(), group=self._group)
        return torch.cat(parts)

    @contextmanager
    def _whole(self, tensors: list[Tensor]) -> Iterator[None]:
        partitioned = [each for each in tensors if isinstance(each, nn.Parameter) and hasattr(each, "ds_id")]
        with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
            yield
