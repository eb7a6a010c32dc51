"""Reads DeepSpeed's checkpoint of an AutoEP run as whole weights: ZeRO-0 to 3, any number of ranks.

ZeRO-0 to 2 write the weights as they are computed with: `mp_rank_00_model_states.pt` and a file per expert. The
optimizer's files have pieces of the fp32 weights, on one flat buffer per rank and parameter group. ZeRO-3 writes the
pieces alone. The files are memory-mapped, and one parameter at a time is put together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import files, tensor_files
from scmoe_ds.checkpoint.autoep.blueprint import Block, State
from scmoe_ds.errors import CheckpointError

_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
_MODEL = "mp_rank_00_model_states.pt"
_EXPERTS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of a parameter in a rank's buffer."""

    rank: int
    flat: Tensor
    start: int
    numel: int


def locate(path: Path) -> Path:
    """The directory of DeepSpeed's files: `path` itself, or the tag that its file "latest" names.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; name a checkpoint of DeepSpeed, or a directory of them")
    latest = path / "latest"
    tag = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    found = files.inside(path, tag, "latest") if tag else path
    if not any(found.glob("*mp_rank_00_model_states.pt")):
        raise CheckpointError(f"{path}: holds no checkpoint of DeepSpeed; name one that engine.save_checkpoint wrote")
    return found


def is_of_autoep(path: Path) -> bool:
    """Whether a path means a checkpoint of DeepSpeed that is not of this package's programs."""
    try:
        return not (locate(path) / files.DESCRIPTION_FILE).is_file()
    except (CheckpointError, OSError, ValueError):
        return False


class Trained:
    """The whole weights of a checkpoint; see `shards.Weights`.

    Args:
        path: the directory of its files.
        dtype: that is asked for; None: as the model computed.

    Raises:
        CheckpointError: it is of another kind of run, or files are missing.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.path = path
        self._names: dict[str, dict[int, str]] = {"optim": {}, "model": {}}
        for file in path.iterdir():
            if match := _FILE.fullmatch(file.name):
                self._require(int(match[2]) == 0, "is of a tensor-parallel run; set tensor_parallel.autotp_size to 1")
                self._names[match[3]][int(match[1])] = file.name
        self.is_partitioned = not (path / _MODEL).is_file()
        self._require(
            not self.is_partitioned or 0 in self._names["model"], "has no model file of rank 0; copy it again"
        )
        self.header = self._read(self._names["model"][0] if self.is_partitioned else _MODEL)
        self.layers = {each["module_path"]: each for each in self.header.get("ds_autoep_layers") or ()}
        self._require(bool(self.layers), "has no AutoEP layers; only runs with expert_parallel are exported so")
        self.config: Mapping[str, Any] = self.header.get("ds_config") or {}
        self.dtype = dtype or self._trained_dtype()
        wide = self.dtype.itemsize > self._trained_dtype().itemsize
        self._pieces = self._index() if self.is_partitioned or wide else {}
        self._expert_file = lru_cache(maxsize=4)(self._read)

    def others(self, names: Iterable[str]) -> State:
        return {name: self._other(name) for name in names}

    def experts(self, block: Block, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.layers.get(block.path)
        self._require(layer is not None, f"has no experts of {block.path}; it is of another model")
        assert layer is not None
        prefix, own = layer["expert_key_prefix"], layer["num_experts"] // layer["ep_size"]
        if layer["num_experts"] != block.num_experts:
            self._require(False, f"{block.path} has {layer['num_experts']} experts there, {block.num_experts} here")
        found = []
        for name in _EXPERTS:
            whole = f"{prefix}.{name}"
            if whole in self._pieces:
                ranks = {expert // own for expert in range(first, first + count)}
                parts = [self._assembled(whole, ep_rank) for ep_rank in sorted(ranks)]
                found.append(torch.cat(parts).narrow(0, first - min(ranks) * own, count))
            else:
                number = layer["moe_layer_id"]
                rows = [
                    self._expert_file(f"layer_{number}_expert_{expert}_{_MODEL}")[f"{whole}.{expert}"]
                    for expert in range(first, first + count)
                ]
                found.append(torch.stack(rows))
        return found[0], found[1], found[2]

    def _other(self, name: str) -> Tensor:
        if name in self._pieces:
            return self._assembled(name)
        found = self.header["module"].get(name)
        self._require(isinstance(found, Tensor), f"has no {name}; it is of another model")
        assert isinstance(found, Tensor)
        return found

    def _trained_dtype(self) -> torch.dtype:
        for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
            if (self.config.get(key) or {}).get("enabled") is True:
                return dtype
        return torch.float32

    def _assembled(self, name: str, ep_rank: int | None = None) -> Tensor:
        pieces = [each for each in self._pieces[name] if ep_rank is None or each.rank in self._ranks_of(ep_rank)]
        shape = self._shapes[name]
        found = torch.cat([each.flat.narrow(0, each.start, each.numel) for each in pieces])
        self._require(found.numel() == math.prod(shape), f"the pieces of {name} do not add up; files are missing")
        return found.view(torch.Size(shape))

    def _ranks_of(self, ep_rank: int) -> range:
        """The ranks that hold a piece of an expert-parallel rank's experts."""
        ep_size, ranks = next(iter(self.layers.values()))["ep_size"], len(self._names["optim"])
        if self.config.get("use_data_before_expert_parallelism"):
            return range(ep_rank * (ranks // ep_size), (ep_rank + 1) * (ranks // ep_size))
        return range(ep_rank, ranks, ep_size)

    def _index(self) -> dict[str, list[_Piece]]:
        ranks = sorted(self._names["optim"])
        self._require(bool(ranks) and ranks == list(range(len(ranks))), f"has optimizer files of ranks {ranks} alone")
        self._shapes = {name: shape for group in self.header["param_shapes"] for name, shape in group.items()}
        found: dict[str, list[_Piece]] = {}
        with tensor_files.as_expected(self.path, "reading"):
            for rank in ranks:
                state = self._read(self._names["optim"][rank])["optimizer_state_dict"]
                for name, piece in self._partitions(rank, state) if self.is_partitioned else _slices(rank, state):
                    found.setdefault(name, []).append(piece)
            if self.is_partitioned:
                self._index_frozen(found)
        return found

    def _partitions(self, rank: int, state: Mapping[str, Any]) -> Iterable[tuple[str, _Piece]]:
        """ZeRO-3: every parameter is cut into as many equal parts as its group has ranks."""
        groups = state.get("ds_zero_partition_groups") or []
        for number, shapes in enumerate(self.header["param_shapes"]):
            group = groups[number] if number < len(groups) else {}
            count = group.get("partition_count", len(self._names["optim"]))
            place, start = group.get("partition_rank", rank), 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                size = math.ceil(numel / count)
                own = max(0, min(size, numel - place * size))
                yield name, _Piece(rank, state["fp32_flat_groups"][number], start, own)
                start += size

    def _index_frozen(self, found: dict[str, list[_Piece]]) -> None:
        """ZeRO-3 keeps weights without a gradient in the model files. The ranks that share experts hold other experts
        each, under the same name."""
        ep_size = next(iter(self.layers.values()))["ep_size"]
        experts = tuple(each["expert_key_prefix"] for each in self.layers.values())
        for rank, name in sorted(self._names["model"].items()):
            header = self._read(name)
            for parameter, fragment in (header.get("frozen_param_fragments") or {}).items():
                shape = header["frozen_param_shapes"][parameter]
                self._shapes[parameter] = shape
                peers = next(each for each in map(self._ranks_of, range(ep_size)) if rank in each)
                same = [
                    each for each in found.get(parameter, ()) if each.rank in peers or not parameter.startswith(experts)
                ]
                before = sum(each.numel for each in same)
                own = min(fragment.numel(), math.prod(shape) - before)
                found.setdefault(parameter, []).append(_Piece(rank, fragment.flatten(), 0, own))

    def _read(self, name: str) -> Any:
        return tensor_files.read(self.path / name, "reading")

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise CheckpointError(f"{self.path}: {otherwise}")


def _slices(rank: int, state: Mapping[str, Any]) -> Iterable[tuple[str, _Piece]]:
    """ZeRO-1 and 2: what DeepSpeed says about its flat buffers."""
    for group, members in enumerate(state["param_slice_mappings"]):
        flat = state["single_partition_of_fp32_groups"][group]
        for name, address in members.items():
            yield name, _Piece(rank, flat, address.start, address.numel)
