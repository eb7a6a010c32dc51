"""Room for a few experts on the device: which are there, which are coming, and which has to go for the next.

Experts that were asked for keep their slot until they have been used. Experts for which no slot is left wait until one
is free: more experts than slots are streamed through.

Among the others the one gives way whose next use is the farthest away. Layers take turns, so that the next turn of
each layer is known. Whether an expert is used then is guessed: one that has let n turns of its layer pass will let n
more pass. (The least recently used expert would be the wrong one: it belongs to the layer whose turn is next. With
fewer slots than layers no expert would ever be found again.)
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scmoe_ds.offload.readers import Arrival
from scmoe_ds.offload.sources import ExpertSource
from scmoe_ds.trace.migrations import MigrationWatch
from scmoe_ds.trace.recorder import Recorder


class ExpertKey(NamedTuple):
    """MoE layer, from 0, and local expert of this rank."""

    layer: int
    expert: int


Names = Callable[[ExpertKey], Mapping[str, str]]
"""An expert's parameters, by the name within the expert: their global names."""


@dataclass
class StoreCounts:
    """What a store has done; numbers of experts.

    Attributes:
        used: computations with an expert.
        hits: of them, those whose expert was asked for when it was there or coming already.
        migrations: experts copied from the slower tier, and bytes of them.
        predicted, confirmed: experts fetched on a guess, and those of them that were then asked for.
        waited_s: seconds that computations stood still for an expert (on a GPU: the host's part alone).
    """

    used: int = 0
    hits: int = 0
    migrations: int = 0
    migrated_bytes: int = 0
    predicted: int = 0
    confirmed: int = 0
    waited_s: float = 0.0


class _Slot:
    """One expert's room: memory that is taken once and written over."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)
        self.tensors: dict[str, Tensor] = dict(module.named_parameters())
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.coming: Arrival | None = None
        self.watch: MigrationWatch | None = None
        # What must be over before the memory is written: kernels may still use what lay there before this slot.
        self.occupied = self._so_far()

    def _so_far(self) -> Arrival | None:
        """The end of all work that has been enqueued on the current stream; None on a CPU, where it is over."""
        parameter = next(iter(self.tensors.values()))
        return torch.cuda.current_stream(parameter.device).record_event() if parameter.is_cuda else None

    def used(self) -> None:
        """Notes that kernels that read it have been enqueued on the current stream."""
        self.occupied = self._so_far()


class ExpertStore:
    """Experts of all MoE layers of a rank, some of them on the device.

    Args:
        source: the slower tier.
        names: of every expert.
        slots: modules of one expert's shape, on the device; their weights are written over. At least one.
        num_layers: MoE layers, which use their experts one after another, pass after pass.

    Attributes:
        counts: what has been done.
        recorder: is told of each migration; None: nobody is.
    """

    def __init__(self, source: ExpertSource, names: Names, slots: Sequence[nn.Module], num_layers: int = 1) -> None:
        self._source, self._names, self._num_layers = source, names, num_layers
        self._turn = 0  # of a layer; those of a pass follow each other
        self._last_turns: dict[ExpertKey, int] = {}  # of held experts: when they were asked for
        self._slots = [_Slot(module) for module in slots]
        self._held: OrderedDict[ExpertKey, _Slot] = OrderedDict()  # there or coming; least recently used first
        # The same keys in the same order, those of each layer by themselves: the farthest is the first of one of them.
        self._of_layers = [OrderedDict[ExpertKey, None]() for _ in range(num_layers)]
        self._empty = list(self._slots)
        self._asked: Counter[ExpertKey] = Counter()  # and not used yet
        self._waiting: deque[ExpertKey] = deque()  # asked for, without a place
        self._guessed: set[ExpertKey] = set()
        self.counts = StoreCounts()
        self.recorder: Recorder | None = None

    @property
    def nbytes(self) -> int:
        """Device memory of all slots."""
        return sum(slot.nbytes for slot in self._slots)

    def fetch(self, keys: Sequence[ExpertKey]) -> None:
        """Asks for experts, in the order in which they will be used, each time once. Returns at once."""
        for key in keys:
            self.counts.hits += key in self._held
            self._turn += (key.layer - self._turn) % self._num_layers
            self._last_turns[key] = self._turn
            if key in self._guessed:
                self._guessed.discard(key)
                self.counts.confirmed += 1
            self._asked[key] += 1
            if key in self._held:
                self._touch(key)
            elif key not in self._waiting:
                self._waiting.append(key)
        self._fill()

    def guess(self, keys: Sequence[ExpertKey]) -> None:
        """Fetches experts that may be asked for, as far as there is a place that nobody has asked for."""
        for key in keys:
            if key in self._held:
                self._touch(key)
                continue
            slot = self._room()
            if slot is None:
                return
            self.counts.predicted += 1
            self._guessed.add(key)
            self._start(key, slot)

    def renew(self, keys: Sequence[ExpertKey]) -> None:
        """All experts have changed where they come from: fetches the first of them anew, as many as there are places.

        Nobody is waiting for one.
        """
        for key in list(self._held):
            self._empty.append(self._forget(key))
        self._asked.clear()
        self.guess(keys[: len(self._slots)])

    def take(self, key: ExpertKey) -> nn.Module:
        """The expert, which was asked for; waits until it is there. Give it back with `release`.

        Raises:
            ExpertFileError: it cannot be read.
        """
        self.counts.used += 1
        if key not in self._held:
            self._waiting.remove(key)
            self._start(key, self._room() or self._take_back())
        slot = self._held[key]
        coming, slot.coming = slot.coming, None
        if coming is not None:
            started = time.perf_counter()
            with slot.watch.waits() if slot.watch else nullcontext():
                coming.wait()
            self.counts.waited_s += time.perf_counter() - started
        return slot.module

    def release(self, key: ExpertKey) -> None:
        """The computation with it has been enqueued."""
        self._held[key].used()
        self._asked[key] -= 1
        if not self._asked[key]:
            del self._asked[key]
        self._fill()

    def _fill(self) -> None:
        while self._waiting and (slot := self._room()) is not None:
            self._start(self._waiting.popleft(), slot)

    def _room(self) -> _Slot | None:
        """A free slot: an empty one, or that of the expert that gives way; None: all experts are asked for."""
        if self._empty:
            return self._empty.pop()
        free = [next((key for key in keys if key not in self._asked), None) for keys in self._of_layers]
        key = max((key for key in free if key is not None), key=self._next_turn, default=None)
        return None if key is None else self._forget(key)

    def _next_turn(self, key: ExpertKey) -> int:
        """In how many turns it is expected to be needed: at the next of its layer, later if it has let some pass."""
        ahead = (key.layer - self._turn - 1) % self._num_layers + 1
        return ahead + (self._turn + ahead - self._last_turns[key] - 1) // self._num_layers * self._num_layers

    def _of_layer(self, key: ExpertKey) -> OrderedDict[ExpertKey, None]:
        return self._of_layers[key.layer % self._num_layers]

    def _touch(self, key: ExpertKey) -> None:
        """It is the most recently used one."""
        self._held.move_to_end(key)
        self._of_layer(key).move_to_end(key)

    def _take_back(self) -> _Slot:
        """The slot of the expert that was asked for last, as all are asked for; it has to come again."""
        key = next(reversed(self._held))
        self._waiting.appendleft(key)
        return self._forget(key)

    def _forget(self, key: ExpertKey) -> _Slot:
        self._guessed.discard(key)
        del self._last_turns[key], self._of_layer(key)[key]
        return self._held.pop(key)

    def _start(self, key: ExpertKey, slot: _Slot) -> None:
        into = {name: slot.tensors[part] for part, name in self._names(key).items()}
        slot.watch = None if self.recorder is None else MigrationWatch(self.recorder, *key, self._source.tier)
        # Where an expert gives way that is still coming, the next one is written after it.
        slot.coming = slot.occupied = self._source.load(into, slot.occupied, slot.watch)
        self._held[key] = slot
        self._of_layer(key)[key] = None
        self._last_turns.setdefault(key, self._turn)
        self.counts.migrations += 1
        self.counts.migrated_bytes += slot.nbytes
