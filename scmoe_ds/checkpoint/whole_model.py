"""The weights of a running engine as one model's: safetensors with the experts of all ranks, under global numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from safetensors.torch import save_file
from torch import Tensor, nn

from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.errors import reason_of
from scmoe_ds.moe.placement import Placement, expert_of, layer_of, with_expert
from scmoe_ds.offload.trainable import by_expert, gather_experts, left_out_of_state_dicts, offloaded_names
from scmoe_ds.parallel.agreement import from_rank_zero, run_on_rank_zero
from scmoe_ds.parallel.process import device


class _Piece(NamedTuple):
    """A tensor of the whole model: its name there, the lowest rank that has it, and its tensor, which on the
    others may be another one of its form, also on the meta device."""

    name: str
    owner: int
    like: Tensor


def save_whole_model(engine: Any, out: Path, shard_bytes: int) -> None:
    """Writes the weights of an engine with DeepSpeed MoE or ScMoE layers, and the model's config.json if it has one.

    Rank 0 writes. The ranks that hold experts send them, one tensor at a time. Offloaded experts come into memory one
    after another. The directory gets its name when all of it is on the disk. Collective.

    Args:
        engine: under ZeRO-0 to 2, on ranks that each hold whole experts.
        out: empty, or it does not exist.
        shard_bytes: most bytes of a file; a larger tensor gets its own.

    Raises:
        CheckpointError: on every rank: the directory is not empty, or rank 0 cannot write.
    """
    model, part = engine.module, from_rank_zero(lambda: shards.claim(out))
    files = _Files(part)

    def finish() -> None:
        files.finish()
        if hasattr(getattr(model, "config", None), "save_pretrained"):
            model.config.save_pretrained(part)
        shards.publish(part, out)

    gather_experts(model)
    with shards.one_sentence(out):
        if dist.get_rank() == 0:
            _receive(model, files, shard_bytes)
        else:
            for piece in _pieces(model):
                if piece.owner == dist.get_rank():
                    dist.send(piece.like.to(device()).contiguous(), 0)
        run_on_rank_zero(finish)


def _receive(model: nn.Module, files: _Files, shard_bytes: int) -> None:
    shard: dict[str, Tensor] = {}
    for piece in _pieces(model):
        tensor = _received(piece)
        if sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
            files.write(shard)
            shard = {}
        shard[piece.name] = tensor
    files.write(shard)


def _pieces(model: nn.Module) -> Iterator[_Piece]:
    """All tensors of the whole model, in the same order on every rank. A tied one comes once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    seen: set[int] = set()
    with left_out_of_state_dicts(model):
        there = model.state_dict()
    for name, tensor in there.items():
        layer = layer_of(name)
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        if layer is None:
            yield _Piece(name, 0, tensor.detach())
            continue
        place, local = Placement.of(layers[layer]), expert_of(name)
        for part in range(place.expert_parallel_size):
            number = part * place.num_local_experts + local
            yield _Piece(with_expert(name, number), place.first_ranks_of(number)[0], tensor.detach())
    yield from _offloaded_pieces(model, layers)


def _offloaded_pieces(model: nn.Module, layers: Mapping[str, MoE]) -> Iterator[_Piece]:
    """Of experts in no state dict; their owner alone reads them."""
    for (experts, key), parts in by_expert(offloaded_names(model)).items():
        place = Placement.of(layers[str(layer_of(next(iter(parts))))])
        for rank in range(place.expert_parallel_size):
            number = rank * place.num_local_experts + key.expert
            owner = place.first_ranks_of(number)[0]
            weights = experts.states.weights(key) if owner == dist.get_rank() else {}
            for name, part in parts.items():
                like = weights.get(part.name, torch.empty(part.shape, dtype=experts.states.dtype, device="meta"))
                yield _Piece(with_expert(name, number), owner, like)


def _received(piece: _Piece) -> Tensor:
    if piece.owner == 0:
        return piece.like.cpu().contiguous()
    buffer = torch.empty_like(piece.like, memory_format=torch.contiguous_format, device=device())
    dist.recv(buffer, piece.owner)
    return buffer.cpu()


class _Files:
    """Shards and their index. After a failure nothing more is written: the other ranks still send."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._failure, self._shards, self._bytes = directory, "", list[list[str]](), 0

    def write(self, shard: dict[str, Tensor]) -> None:
        """Writes a shard; how many there will be is not known yet."""
        if not shard or self._failure:
            return
        try:
            save_file(shard, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(shard))
            self._bytes += sum(each.nbytes for each in shard.values())
        except Exception as error:  # OSError, and safetensors' own
            self._failure = reason_of(error)

    def finish(self) -> None:
        """Gives the shards their names, and writes the index. Raises an OSError if a shard was not written."""
        if self._failure:
            raise OSError(self._failure)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self._directory / f"shard_{number:05d}.part"
