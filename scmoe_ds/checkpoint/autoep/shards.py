"""Lays out a model's files before any weight is read, and writes one shard after the other.

Every rank computes the same layout, so each writes its own shards under their final names, and nobody holds more than
one shard.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from scmoe_ds.checkpoint.adapted.family import MODELING_FILE, adapted_config, modeling_file
from scmoe_ds.checkpoint.autoep.blueprint import Block, Blueprint, State
from scmoe_ds.checkpoint.files import PART
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.config.deepspeed_json import at
from scmoe_ds.data.durable_files import flush
from scmoe_ds.errors import CheckpointError, reason_of
from scmoe_ds.parallel.output import log
from scmoe_ds.replace.origin import CONFIG_FILE, Origin, is_converted

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files of the original directory that go with the weights."""
OTHERS = None
"""The owner of what every rank has."""


class Weights(Protocol):
    """Where weights come from: a running engine, or a checkpoint.

    Attributes:
        dtype: that parameters get in the files.
    """

    dtype: torch.dtype

    def others(self, names: Iterable[str]) -> State:
        """Whole weights that are no routed experts, by AutoEP's names."""

    def experts(self, block: Block, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """w1, w2 and w3 of consecutive experts."""


@dataclass(frozen=True)
class Unit:
    """What is converted at once: the other weights of a layer, or consecutive experts of one block.

    Attributes:
        owner: the expert-parallel rank that has the experts; OTHERS: every rank has the weights, or all together.
        shapes: of the tensors in the files.
        names: the model's names; none for experts.
    """

    owner: int | None
    shapes: Mapping[str, torch.Size]
    names: tuple[str, ...] = ()
    block: Block | None = None
    first: int = 0
    count: int = 0

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())


@dataclass
class Shard:
    """A file, and who writes it."""

    owner: int | None
    name: str = ""
    units: list[Unit] = field(default_factory=list)


def units_of(blueprint: Blueprint, ep_size: int, most_numel: int) -> Iterator[Unit]:
    """All weights of a model, layer after layer.

    Args:
        ep_size: among how many owners the experts are divided.
        most_numel: elements that a unit of several experts may have.
    """
    like = blueprint.model.state_dict()
    for layer, names in blueprint.layers().items():
        found = blueprint.in_files({name: like[name] for name in names})
        yield Unit(OTHERS, {name: tensor.shape for name, tensor in found.items()}, tuple(names))
        for block in blueprint.blocks:
            if layer and block.path.startswith(f"{layer}."):
                yield from _experts_of(blueprint, block, ep_size, most_numel)


def _experts_of(blueprint: Blueprint, block: Block, ep_size: int, most_numel: int) -> Iterator[Unit]:
    def shapes(count: int, first: int, rows: int) -> dict[str, torch.Size]:
        state = {block.gate_up: torch.empty(rows, *block.gate_up_shape, device="meta")}
        if count:
            state[block.down] = torch.empty(count, *block.down_shape, device="meta")
        return {name: tensor.shape for name, tensor in blueprint.in_files(state, first).items()}

    if blueprint.has_fused_files(block):
        yield Unit(OTHERS, shapes(block.num_experts, 0, block.rows), (), block, 0, block.num_experts)
        return
    own = block.num_experts // ep_size
    each = sum(shape.numel() for shape in shapes(1, 0, 1).values())
    step = max(1, min(own, most_numel // each))
    for owner in range(ep_size):
        for first in range(owner * own, (owner + 1) * own, step):
            count = min(step, (owner + 1) * own - first)
            yield Unit(owner, shapes(count, first, count), (), block, first, count)
    if block.rows > block.num_experts:
        extra = block.rows - block.num_experts
        yield Unit(OTHERS, shapes(0, block.num_experts, extra), (), block, block.num_experts, 0)


def lay_out(units: Iterable[Unit], most_numel: int) -> list[Shard]:
    """Units in files of at most so many elements, or of one unit. Each file has one owner; their order stays."""
    shards: list[Shard] = []
    filled = 0
    for unit in units:
        if not shards or shards[-1].owner != unit.owner or filled + unit.numel > most_numel:
            shards.append(Shard(unit.owner))
            filled = 0
        shards[-1].units.append(unit)
        filled += unit.numel
    for number, shard in enumerate(shards, start=1):
        shard.name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


def read_unit(unit: Unit, weights: Weights, blueprint: Blueprint) -> State:
    """A unit's tensors on the CPU, by their names in the files. Buffers keep their dtype."""
    block = unit.block
    if block is None:
        trained = {name: blueprint.other_names[name] for name in unit.names}
        found = weights.others(trained.values())
        state = {name: found[other] for name, other in trained.items()}
    elif unit.count:
        state = block.fused(*weights.experts(block, unit.first, unit.count))
        if unit.count == block.num_experts < block.rows and block.gate_up in unit.shapes:
            state[block.gate_up] = torch.cat([state[block.gate_up], block.without_weights(weights.dtype)])
    else:
        state = {block.gate_up: block.without_weights(weights.dtype)}
    cast = {
        name: tensor.detach().to("cpu", None if name in blueprint.buffers else weights.dtype)
        for name, tensor in state.items()
    }
    written = blueprint.in_files(cast, unit.first)
    for name, shape in unit.shapes.items():
        if name not in written or written[name].shape != shape:
            there = list(written[name].shape) if name in written else "missing"
            raise CheckpointError(f"{name}: is {there}, but {list(shape)} by the model's config.json; name its own")
    return written


def write_shard(shard: Shard, directory: Path, states: Iterable[State]) -> int:
    """Writes a shard and waits until it is on the disk; returns the bytes of its tensors."""
    held = {name: tensor.contiguous() for state in states for name, tensor in state.items()}
    save_file(held, directory / shard.name, metadata={"format": "pt"})
    flush(directory / shard.name)
    return sum(tensor.nbytes for tensor in held.values())


def write_index(shards: Iterable[Shard], directory: Path, total_bytes: int) -> None:
    """Names the shard of every tensor."""
    weight_map = {name: shard.name for shard in shards for unit in shard.units for name in unit.shapes}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_others(directory: Path, origin: Origin, model: Any, dtype: torch.dtype, whole: Mapping[str, Any]) -> None:
    """Writes config.json, for an adapted model the file of its classes, and copies tokenizer and generation settings
    from where the model came from.

    Args:
        model: of the class that the origin names.
        dtype: of the weights; the rest of config.json stays as it was.
        whole: the DeepSpeed JSON of the run.
    """
    (directory / CONFIG_FILE).write_text(_config(origin, dtype, whole), encoding="utf-8")
    if is_converted(origin):
        (directory / MODELING_FILE).write_text(modeling_file(model), encoding="utf-8")
    original = Path(origin["directory"] or "")
    if origin["directory"]:
        carry(original, directory)
    if origin["directory"] and not original.is_dir():
        log(
            f"{directory.stem}: has no tokenizer, because {original}, from which the model was loaded, is not there",
            level=logging.WARNING,
        )


def carry(source: Path, directory: Path) -> None:
    """Copies the files of `CARRIED` that a model's directory has into another one."""
    for file in {file for pattern in CARRIED for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, directory / file.name)


def _config(origin: Origin, dtype: torch.dtype, whole: Mapping[str, Any]) -> str:
    before = json.loads(origin["config"])
    after = {**before, "torch_dtype" if "torch_dtype" in before else "dtype": str(dtype).removeprefix("torch.")}
    if not before.get("architectures"):
        after["architectures"] = [origin["class"]]
    if is_converted(origin):
        after = adapted_config(after, origin["scmoe"])
    elif at(whole, "scmoe.architecture") == "scmoe" and origin.get("scmoe") is None:
        after["scmoe"] = dict(whole["scmoe"])
        log(
            'the model was trained with scmoe.architecture = "scmoe": transformers alone computes the unconverted '
            "function with these weights; scmoe_ds.initialize with the same section, which config.json has, computes "
            "what was trained",
            level=logging.WARNING,
        )
    return str(origin["config"]) if after == before else json.dumps(after, indent=2) + "\n"


def claim(directory: Path) -> Path:
    """The directory to write in until all of it is on the disk. Raises a CheckpointError if the final one is used."""
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(f"{directory} is not empty; name another directory for the weights")
        part = directory.with_name(directory.name + PART)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be written ({reason_of(error)}); choose another directory"
        ) from None
    return part


def publish(part: Path, directory: Path) -> None:
    """Gives a written directory its name, when all of it is on the disk."""
    for file in part.iterdir():
        flush(file)
    flush(part)
    if directory.exists():
        directory.rmdir()  # empty: `claim` has looked
    part.rename(directory)
    flush(directory.parent)


@contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """Turns an operating system's error into a sentence. After any error, nothing of what was written is left."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(directory.with_name(directory.name + PART), ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise CheckpointError(
            f"{directory}: the weights were not written ({reason_of(error)}); make room or choose another directory"
        ) from error
