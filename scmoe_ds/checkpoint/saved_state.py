"""Reads a DeepSpeed checkpoint as whole parameters, whatever layout wrote it.

ZeRO-1 and ZeRO-2 keep per rank one flat fp32 buffer for each group of parameters, and buffers of its shape for the
optimizer's moments. `param_slice_mappings` says which part of the buffer is a piece of which parameter. The pieces of a
parameter, in order of the data-parallel ranks (for experts: expert-data-parallel), form the tensor of one
tensor-parallel rank; these tensors form the whole parameter.

The files are memory-mapped. One parameter at a time is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import files, offloaded, tensor_files
from scmoe_ds.checkpoint.files import DamagedCheckpointError, remedy
from scmoe_ds.errors import CheckpointError
from scmoe_ds.moe.placement import Placement, expert_of, layer_of, with_expert
from scmoe_ds.moe.router import CORRECTION_BIAS
from scmoe_ds.parallel.tensor import Split, unshard

MASTER = "fp32"
"""The key of a parameter's fp32 weights. Other keys are the optimizer's, such as "exp_avg"."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class _Piece:
    """Where consecutive elements of a parameter lie in the files."""

    file: int
    group: int
    start: int
    numel: int


class SavedState:
    """The whole parameters and optimizer states of a checkpoint.

    Args:
        path: its directory.
        description: its scmoe.json.

    Raises:
        CheckpointError: the layout binds the files to it, or files are missing.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path, self.layout = path, description["layout"]
        self._manifest = files.read_manifest(path, "reading")
        splits = description.get("splits", {})
        self._splits = {name: Split(dim, tuple(sections)) for name, (dim, sections) in splits.items()}
        fields.check_layout_is_free(self.layout, str(path))
        self._models = [self._load(f"mp_rank_{rank:02d}_model_states.pt") for rank in range(self._tensor_ranks)]
        self._files: list[Any] = []
        self._pieces: dict[str, dict[int, list[_Piece]]] = {}  # by global name, then by tensor-parallel rank
        self._offloaded: dict[str, dict[str, Any]] = {}  # experts that have files of their own
        with tensor_files.as_expected(path, "reading"):
            self._index()
            # Routers' biases, which no optimizer has, are the same on all ranks.
            named = self.header["module"].items()
            self._biases: dict[str, Tensor] = {key: each for key, each in named if key.endswith(f".{CORRECTION_BIAS}")}
            self._shapes = {
                with_expert(name, 0): torch.Size(shape)
                for group in self.header["param_shapes"]
                for name, shape in group.items()
            }

    @property
    def header(self) -> dict[str, Any]:
        """Counters, learning-rate schedule and client state, which are the same on all ranks."""
        return self._models[0]

    @property
    def optimizer_header(self) -> dict[str, Any]:
        """The ZeRO optimizer's own settings, such as the loss scaler, which are the same on all ranks."""
        return self._files[0]

    def names(self) -> list[str]:
        """Global names of all parameters that are trained, and of the routers' biases."""
        return sorted([*self._pieces, *self._offloaded, *self._biases])

    def read(self, name: str, key: str = MASTER) -> Tensor:
        """A whole parameter, or an optimizer state of its shape. Raises a DamagedCheckpointError if the pieces do not
        add up to it."""
        if name in self._biases:
            return self._biases[name].float()
        if name in self._offloaded:
            return self._offloaded[name][offloaded.STATES][key]
        rule = self._splits.get(with_expert(name, 0))
        ranks = sorted(self._pieces[name]) if rule is not None else [min(self._pieces[name])]
        return unshard([self._part(name, rank, key, rule) for rank in ranks], rule)

    def shape(self, name: str) -> list[int]:
        """Of the whole parameter."""
        if name in self._biases:
            return list(self._biases[name].shape)
        if name in self._offloaded:
            return list(self._offloaded[name][offloaded.STATES][MASTER].shape)
        shape, rule = list(self._shapes[with_expert(name, 0)]), self._splits.get(with_expert(name, 0))
        if rule is not None:
            shape[rule.dim] = sum(rule.sections)
        return shape

    def optimizer_state(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """The keys under which `read` finds states of the parameter's shape, and the other states (the step count)."""
        if name in self._offloaded:
            found = self._offloaded[name]
            steps, keys = found[offloaded.STEPS], [key for key in found[offloaded.STATES] if key != MASTER]
            return (keys, {"step": torch.tensor(steps)}) if steps else ([], {})
        piece = self._first_piece(name)
        flat = self._flat(piece, MASTER)
        whole, other = [], {}
        for key, value in self._optimizer(piece)["state"].get(piece.group, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.numel() >= flat.numel():
                whole.append(key)
            else:
                other[key] = value.clone() if isinstance(value, Tensor) else value
        return whole, other

    def group_options(self, name: str) -> dict[str, Any]:
        """Learning rate, betas, … of the parameter's group."""
        if name in self._offloaded:
            return dict(self._offloaded[name][offloaded.OPTIONS])
        piece = self._first_piece(name)
        group = self._optimizer(piece)["param_groups"][piece.group]
        return {key: value for key, value in group.items() if key not in ("params", "name", "moe")}

    @property
    def _tensor_ranks(self) -> int:
        return self.layout[fields.TENSOR_PARALLEL]

    def _load(self, name: str) -> Any:
        files.require_named(name, self.path, self._manifest, "reading")
        return tensor_files.read(self.path / name, "reading")

    def _index(self) -> None:
        places = {}
        for name in self._manifest:
            if match := _OPTIMIZER_FILE.fullmatch(name):
                places[int(match[1]) * self._tensor_ranks + int(match[2])] = name
        if sorted(places) != list(range(self.layout[fields.PROCESSES])):
            raise DamagedCheckpointError(
                f"{self.path}: has optimizer files of ranks {sorted(places)}, not of all "
                f"{self.layout[fields.PROCESSES]}. {remedy(self.path)}"
            )
        self._files = [self._load(places[rank])["optimizer_state_dict"] for rank in sorted(places)]
        if not all(isinstance(each["base_optimizer_state"], dict) for each in self._files):
            raise CheckpointError(
                f"{self.path} was written with zero_optimization.elastic_checkpoint = true; resume "
                "on the same layout, or save without"
            )
        found = [
            (name, _Piece(rank, group, address.start, address.numel))
            for rank, each in enumerate(self._files)  # ranks ascend, and so do the pieces
            for group, members in enumerate(each["param_slice_mappings"])
            for name, address in members.items()
            if f".{offloaded.STAND_IN}" not in name
        ]
        for file in self._manifest:
            if offloaded.EXPERT_FILE.fullmatch(file):
                self._offloaded.update(self._load(file))
        num_local_experts: dict[str, int] = {}
        for name, _ in found:
            if (layer := layer_of(name)) is not None:
                num_local_experts[layer] = max(num_local_experts.get(layer, 0), expert_of(name) + 1)
        for name, piece in found:
            name, tensor_rank = self._whole_name(name, piece.file, num_local_experts)
            self._pieces.setdefault(name, {}).setdefault(tensor_rank, []).append(piece)

    def _whole_name(self, name: str, rank: int, num_local_experts: Mapping[str, int]) -> tuple[str, int]:
        """The global name of the parameter that a rank calls `name`, and the tensor-parallel rank of its part."""
        tensor_rank, layer = rank % self._tensor_ranks, layer_of(name)
        if layer is None:
            return name, tensor_rank
        divided = self.layout[fields.EXPERT_TENSOR_PARALLEL]
        placement = Placement(
            self.layout[fields.EXPERT_PARALLEL], num_local_experts[layer], self._tensor_ranks if divided else 1
        )
        name = with_expert(name, placement.first_expert(rank) + expert_of(name))
        return name, tensor_rank if divided else 0

    def _part(self, name: str, tensor_rank: int, key: str, rule: Split | None) -> Tensor:
        shape = self.shape(name)
        if rule is not None:
            shape[rule.dim] //= len(self._pieces[name])
        pieces = self._pieces[name][tensor_rank]
        found = torch.cat([self._flat(piece, key).narrow(0, piece.start, piece.numel) for piece in pieces])
        if found.numel() != math.prod(shape):
            raise DamagedCheckpointError(
                f"{self.path}: the pieces of {name} ({key}) have {found.numel()} elements instead of "
                f"{math.prod(shape)}. {remedy(self.path)}"
            )
        return found.view(shape)

    def _flat(self, piece: _Piece, key: str) -> Tensor:
        if key == MASTER:
            return self._files[piece.file]["single_partition_of_fp32_groups"][piece.group]
        return self._optimizer(piece)["state"][piece.group][key]

    def _optimizer(self, piece: _Piece) -> dict[str, Any]:
        return self._files[piece.file]["base_optimizer_state"]

    def _first_piece(self, name: str) -> _Piece:
        return next(iter(self._pieces[name].values()))[0]
