"""The weights of a running engine as one model's: safetensors with the experts of all ranks, under global numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from safetensors.torch import save_file
from torch import Tensor, nn

from scmoe_ds.checkpoint.safetensors_files import INDEX_FILE
from scmoe_ds.errors import CheckpointError, reason_of
from scmoe_ds.moe.placement import Placement, expert_of, layer_of, with_expert
from scmoe_ds.parallel.agreement import run_on_rank_zero, run_together


class _Piece(NamedTuple):
    """A tensor of the whole model: its name there, the lowest rank that has it, and its tensor or one of its form."""

    name: str
    owner: int
    like: Tensor


def save_whole_model(engine: Any, out: Path, shard_bytes: int) -> None:
    """As `write_whole_model`, into a directory of its own, with the model's config.json if it has one. Raises a
    CheckpointError on every rank if the directory is not empty."""
    model = engine.module

    def make() -> None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                raise CheckpointError(f"{out} is not empty; name another directory for the weights")
            if hasattr(getattr(model, "config", None), "save_pretrained"):
                model.config.save_pretrained(out)
        except OSError as error:
            raise CheckpointError(f"{out}: cannot be written ({reason_of(error)}); choose another directory") from None

    run_on_rank_zero(make)
    write_whole_model(engine, out, shard_bytes)


def write_whole_model(engine: Any, out: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Writes the weights of an engine with DeepSpeed MoE or ScMoE layers, in place of other weights in the directory.

    Rank 0 writes. The ranks that hold experts send them, one tensor at a time. Collective.

    Args:
        engine: under ZeRO-0 to 2, on ranks that each hold whole experts.
        out: exists on rank 0.
        shard_bytes: most bytes of a file; a larger tensor gets its own.

    Raises:
        CheckpointError: on every rank: rank 0 cannot write.
    """
    failure: list[str] = []
    if dist.get_rank() == 0:
        files, shard = _Files(out, failure), dict[str, Tensor]()
        for piece in _pieces(engine.module):
            tensor = _received(piece)
            if sum(each.nbytes for each in shard.values()) + tensor.nbytes > shard_bytes:
                files.write(shard)
                shard = {}
            shard[piece.name] = tensor
        files.write(shard)
        files.finish()
    else:
        for piece in _pieces(engine.module):
            if piece.owner == dist.get_rank():
                dist.send(piece.like.contiguous(), 0)

    def check() -> None:
        if failure:
            raise CheckpointError(f"{out}: the weights were not written ({failure[0]}); make room or choose another")

    run_together(check)


def _pieces(model: nn.Module) -> Iterator[_Piece]:
    """All tensors of the whole model, in the same order on every rank. A tied one comes once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
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


def _received(piece: _Piece) -> Tensor:
    if piece.owner == 0:
        return piece.like.cpu().contiguous()
    buffer = torch.empty_like(piece.like, memory_format=torch.contiguous_format)
    dist.recv(buffer, piece.owner)
    return buffer.cpu()


class _Files:
    """Shards and their index. After a failure nothing more is written: the other ranks still send."""

    def __init__(self, out: Path, failure: list[str]) -> None:
        self._out, self._failure, self._shards, self._bytes = out, failure, list[list[str]](), 0

    def write(self, shard: dict[str, Tensor]) -> None:
        """Writes a shard under a name that nobody reads yet."""
        if not shard or self._failure:
            return
        try:
            save_file(shard, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(shard))
            self._bytes += sum(each.nbytes for each in shard.values())
        except Exception as error:  # OSError, and safetensors' own
            self._failure.append(reason_of(error))

    def finish(self) -> None:
        """Puts the shards in the place of the weights that were there."""
        if self._failure:
            return
        try:
            for old in (*self._out.glob("model*.safetensors"), self._out / INDEX_FILE):
                old.unlink(missing_ok=True)
            weight_map: dict[str, str] = {}
            for number, names in enumerate(self._shards):
                final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
                self._part(number).rename(self._out / final)
                weight_map |= dict.fromkeys(names, final)
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self._out / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            self._failure.append(reason_of(error))

    def _part(self, number: int) -> Path:
        return self._out / f"shard_{number:05d}.part"
