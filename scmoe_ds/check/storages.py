"""The memory of tensors over time: which storages of a device are alive, and what for. Of fake and of real tensors.

An operator's results show in a dispatch mode, the end of a storage in a weak reference. Memory that a kernel takes and
returns inside is not seen, nor is what a caching allocator holds beside the tensors.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scmoe_ds.compat import storage_key

_BLOCK = 512
"""Bytes. CUDA's caching allocator gives multiples of it."""


class Storages(TorchDispatchMode):
    """Inside the block, storages that operators make on a device are counted while they live.

    Args:
        device: its type, "cuda" or "cpu".

    Attributes:
        what_for: of the storages that are made next.
        alive: bytes of all that live, by what they are for.
        most: `alive` at the moment when the sum was largest since `reset`.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.what_for = device, "other"
        self.alive: Counter[str] = Counter()
        self.most: dict[str, int] = {}
        self._known: dict[int, tuple[int, str]] = {}
        self._total = self._most_total = 0

    @property
    def total(self) -> int:
        """Bytes that are alive."""
        return self._total

    @property
    def peak(self) -> int:
        """The most that was alive since `reset`."""
        return self._most_total

    def reset(self) -> None:
        """Looks for the peak anew."""
        self._most_total, self.most = self._total, dict(self.alive)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in [result] if isinstance(result, Tensor) else tree_iter(result):
            if isinstance(value, Tensor) and value.device.type == self.device:
                self.see(value)
        return result

    def see(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._known:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._known[key] = size, self.what_for
        self.alive[self.what_for] += size
        self._total += size
        if self._total > self._most_total:
            self.reset()
        weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        size, what_for = self._known.pop(key)
        self.alive[what_for] -= size
        self._total -= size

    def rename(self, tensors: Iterable[Any], what_for: str, since: Sequence[str] = ()) -> None:
        """Says what the storages of tensors are for.

        Args:
            tensors: those of other devices, and None, are left out.
            since: only storages that are for one of these so far; default: all.
        """
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or tensor.device.type != self.device:
                continue
            self.see(tensor)
            key = storage_key(tensor)
            size, before = self._known[key]
            if not since or before in since:
                self._known[key] = size, what_for
                self.alive[before] -= size
                self.alive[what_for] += size

    def rename_all(self, what_for: str, before: str | None = None) -> None:
        """Says what all storages are for that live, or those that are for `before` so far."""
        for key, (size, old) in self._known.items():
            if before in (None, old):
                self._known[key] = size, what_for
                self.alive[old] -= size
                self.alive[what_for] += size
