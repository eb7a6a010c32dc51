"""Experts that are trained out of memory, in a checkpoint: two files for each, one expert after another.

layer_<l>_expert_<e>_mp_rank_00_model_states.pt  the weights, DeepSpeed's own file
layer_<l>_expert_<e>_mp_rank_00_optim_states.pt  fp32 weights and moments, which ZeRO does not hold
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scmoe_ds.moe.placement import expert_of
from scmoe_ds.offload.shape import Part
from scmoe_ds.offload.states import MASTER
from scmoe_ds.offload.step import MOMENTS
from scmoe_ds.offload.store import ExpertKey
from scmoe_ds.offload.trainable import STAND_IN as STAND_IN
from scmoe_ds.offload.trainable import TrainableExperts, by_expert, offloaded, offloaded_names, write_experts
from scmoe_ds.offload.trainable import left_out_of_state_dicts as left_out_of_state_dicts

EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_optim_states\.pt")
STATES, STEPS, OPTIONS = "states", "steps", "group options"
"""Keys of what an optimizer file has of each parameter."""


def write(engine: Any, directory: Path) -> None:
    """The experts whose states this rank keeps, with DeepSpeed's writer; nothing where they are in memory."""
    named = _kept(engine.module)
    options = _options(engine) if named else {}
    for (experts, key), parts in by_expert(named).items():
        states, steps = experts.states.read(key)
        name = f"layer_{key.layer}_expert_{expert_of(next(iter(parts)))}_mp_rank_00"
        weights = {each: states[part.name][MASTER].to(experts.states.dtype) for each, part in parts.items()}
        engine.checkpoint_engine.save(weights, str(directory / f"{name}_model_states.pt"))
        found = {
            each: {STATES: states[part.name], STEPS: steps, OPTIONS: options[part.group]}
            for each, part in parts.items()
        }
        engine.checkpoint_engine.save(found, str(directory / f"{name}_optim_states.pt"))


def _kept(model: nn.Module) -> dict[str, tuple[TrainableExperts, ExpertKey, Part]]:
    """Those of `offloaded_names` whose states this rank keeps."""
    return {
        name: (where, key, part)
        for name, (where, key, part) in offloaded_names(model).items()
        if key in where.states.kept
    }


def _options(engine: Any) -> dict[int, dict[str, Any]]:
    """Of each group of `ExpertShape`, what its parameters are stepped with."""
    groups, found = engine.optimizer.optimizer.param_groups, {}
    for experts in offloaded(engine.module)[:1]:
        for group, stand_in in experts.stand_ins.items():
            number = next(n for n, each in enumerate(engine.optimizer.bit16_groups) if any(p is stand_in for p in each))
            found[group] = {k: v for k, v in groups[number].items() if k not in ("params", "name", "moe")}
    return found


def put_weights(model: nn.Module, weights: Any) -> None:
    """Sets all offloaded experts, as before their first step."""
    write_experts(model, lambda name, _: {MASTER: weights.read(name)})


def put_state(engine: Any, saved: Any) -> None:
    """Sets all offloaded experts with their moments, and the options of their groups."""

    def steps_of(name: str) -> float:
        return float(saved.optimizer_state(name)[1].get("step", 0))

    def states_of(name: str, _: Any) -> dict[str, Tensor]:
        keys = (MASTER, *MOMENTS) if steps_of(name) else (MASTER,)
        return {key: saved.read(name, key) for key in keys}

    write_experts(engine.module, states_of, steps_of)
    groups = engine.optimizer.optimizer.param_groups
    examples = {part.group: name for name, (_, _, part) in offloaded_names(engine.module).items()}
    for group, stand_in in offloaded(engine.module)[0].stand_ins.items():
        for number, members in enumerate(engine.optimizer.bit16_groups):
            if any(each is stand_in for each in members):
                groups[number].update(saved.group_options(examples[group]))


def stand_ins(model: nn.Module) -> set[int]:
    """`id` of the parameters that no checkpoint has."""
    return {id(each) for experts in offloaded(model) for each in experts.stand_ins.values()}


def held(engine: Any) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Of each expert whose states this rank keeps: of each parameter, by its name, the fp32 weights and moments."""
    for (experts, key), parts in by_expert(_kept(engine.module)).items():
        states, _ = experts.states.read(key)
        yield {name: states[part.name] for name, part in parts.items()}
