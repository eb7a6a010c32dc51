"""Keys and values of the tokens that were read, so that each new token costs one step and not a whole forward pass.

All memory is taken at the start. Rows of a batch have lengths of their own: prompts are padded on the right, and a
token looks at the places up to its own, so that no row ever sees padding.

Shape suffixes: B rows, S new tokens of each, G key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import Attention
from scmoe_ds.moe.experts import to_device


class KeyValueCache:
    """The cache of all attention layers of one model.

    Args:
        model: has its parameters; each of its attention layers keeps its own heads (of this tensor-parallel rank).
        rows: most sequences of a batch.
        capacity: most tokens of a sequence.

    Attributes:
        nbytes: what it holds.
    """

    def __init__(self, model: GPT, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        weight = model.embedding.weight
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self._lengths_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._row_B1 = torch.arange(rows, device=weight.device).unsqueeze(1)
        self._used_rows, self._longest, self._passes = rows, 0, 0
        self._next: _Places | None = None  # of the pass under way: the same in all layers
        self._layers = [_LayerCache(self, attention, weight) for attention in self._attentions]
        self.nbytes = sum(layer.nbytes for layer in self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, the model's attention layers read and write this cache."""
        for attention, layer in zip(self._attentions, self._layers, strict=True):
            attention.cache = layer
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.cache = None

    def begin(self, rows: int) -> None:
        """Forgets everything; the next batch has so many rows."""
        assert rows <= self.rows
        self._used_rows, self._longest, self._passes, self._next = rows, 0, 0, None
        self._lengths_B.zero_()

    def advance(self, added: Sequence[int]) -> None:
        """How many of the tokens that were just read each row keeps; the others are written over by the next ones."""
        lengths_B = self._lengths_B[: self._used_rows]
        lengths_B += to_device(torch.tensor(added), lengths_B.device)
        self._longest += max(added)
        self._passes, self._next = self._passes + 1, None

    @property
    def grown(self) -> bool:
        """Whether tokens came after the prompts."""
        return self._passes > 1

    @property
    def empty(self) -> bool:
        """Whether nothing has been kept yet."""
        return self._passes == 0

    def positions(self, sequence: int) -> Tensor:
        """[B, S] int64 places of the next tokens; of a row that is full, its last place."""
        return self.places(sequence).position_BS

    def places(self, sequence: int) -> _Places:
        """Of the next tokens. Computed once for all layers: on a GPU each small kernel costs a launch."""
        if self._next is None or self._next.position_BS.shape[1] != sequence:
            device, used = self._lengths_B.device, min(self._longest + sequence, self.capacity)
            offsets_S = torch.arange(sequence, device=device)
            position_BS = (self._lengths_B[: self._used_rows].unsqueeze(1) + offsets_S).clamp(max=self.capacity - 1)
            seen_BSU = None if self.empty else torch.arange(used, device=device) <= position_BS.unsqueeze(2)
            self._next = _Places(self._row_B1[: self._used_rows], position_BS, used, seen_BSU)
        return self._next


class _Places(NamedTuple):
    """Row and position of every next token, how many positions are in use with them, and which of these each token
    sees; None: it is the prompt, which sees itself."""

    row_B1: Tensor
    position_BS: Tensor
    used: int
    seen_BSU: Tensor | None


class _LayerCache:
    """One attention layer's part; what scmoe_ds.models.layers.AttentionCache asks for."""

    def __init__(self, whole: KeyValueCache, attention: Attention, like: Tensor) -> None:
        self._whole, self.capacity = whole, whole.capacity
        shape = (whole.rows, attention.heads[1], whole.capacity, attention.head_size)
        self._keys, self._values = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def positions(self, sequence: int) -> Tensor:
        return self._whole.positions(sequence)

    def extend(self, key_BGSH: Tensor, value_BGSH: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        B, _, S, _ = key_BGSH.shape
        keys, values = self._keys[:B], self._values[:B]
        row_B1, position_BS, used, seen_BSU = self._whole.places(S)
        if seen_BSU is None:  # the prompt: it is all there is to look at
            keys[:, :, :S], values[:, :, :S] = key_BGSH, value_BGSH
            return key_BGSH, value_BGSH, None
        keys[row_B1, :, position_BS] = key_BGSH.transpose(1, 2)
        values[row_B1, :, position_BS] = value_BGSH.transpose(1, 2)
        return keys[:, :, :used], values[:, :, :used], seen_BSU.unsqueeze(1)
