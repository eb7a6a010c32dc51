"""The routed experts of one MoE layer in a model's files, one at a time.

F inner width, D hidden.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from scmoe_ds.checkpoint.adapted.source import SourceDirectory
from scmoe_ds.checkpoint.autoep.tensor_slices import LazyTensor
from scmoe_ds.errors import CheckpointError

_NAMES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
"""What the files call an expert's matrices: Qwen's and most families' names, Mixtral's."""


class ExpertsInFiles:
    """Experts in one file name each, or fused as transformers has them in memory.

    Args:
        source: the directory.
        place: of the block.

    Raises:
        CheckpointError: the files hold no experts of the block.
    """

    def __init__(self, source: SourceDirectory, place: int) -> None:
        self.source, begin = source, re.escape(source.names_of(place))
        one = re.compile(begin + r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
        fused = re.compile(begin + r"(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)")
        self._single: dict[int, dict[str, str]] = {}
        self._fused: dict[str, str] = {}
        for name in source.tensors:
            if (found := one.fullmatch(name)) and found[2] in _NAMES:
                self._single.setdefault(int(found[1]), {})[_NAMES[found[2]]] = name
            elif found := fused.fullmatch(name):
                self._fused[found[1]] = name
        complete = all(len(each) == 3 for each in self._single.values()) if self._single else len(self._fused) == 2
        if not complete:
            raise CheckpointError(
                f"{source.path}: its files do not hold the experts of block {place} under names that are known here; "
                "use --shared-expert none, or save the model by transformers' save_pretrained"
            )

    def __len__(self) -> int:
        if self._single:
            return len(self._single)
        return int(self.source.tensors[self._fused["down_proj"]].get_shape()[0])

    def read(self, number: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert."""
        if not self._single:
            whole = (self.source.tensors[self._fused[each]] for each in ("gate_up_proj", "down_proj"))
            gate_up, down = (LazyTensor(each.file, each.name, slice(number, number + 1))[0] for each in whole)
            return gate_up, down
        names = self._single[number]
        gate_up = torch.cat([self.source.read(names["gate"]), self.source.read(names["up"])])
        return gate_up, self.source.read(names["down"])

    def mean(self) -> tuple[Tensor, Tensor]:
        """The same of the mean expert, fp32."""
        gate_up, down = (each.float() for each in self.read(0))
        for number in range(1, len(self)):
            for total, one in zip((gate_up, down), self.read(number), strict=True):
                total += one
        return gate_up / len(self), down / len(self)
