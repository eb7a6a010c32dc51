"""States of experts that other ranks have, too (expert data parallelism): each rank keeps the states of some of them.

As under ZeRO-1 a step's gradients are averaged, one rank makes the step of an expert, and the others get its weights:

    join      at the start: all weights, from the first rank, as DeepSpeed's engine sends those in memory
    reduce    before the optimizer's step: the sum of the ranks' gradients, expert after expert
    gather    when a layer's experts are asked for the first time after a step: their weights, from those who stepped

NCCL wants all collectives of a device in the same order on all ranks, whatever their group. So the thread that trains
launches them, at these places and for all experts, whether they have rows on this rank or not. It waits until the
workers have brought what it sends. They wait for what is received; on a GPU that happens on streams of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.errors import CheckpointError
from scmoe_ds.offload.readers import Arrival
from scmoe_ds.offload.records import Records
from scmoe_ds.offload.room import GRADIENT, LOW, WEIGHTS, Room
from scmoe_ds.offload.shape import ExpertShape
from scmoe_ds.offload.states import ARRIVE, ExpertStates
from scmoe_ds.offload.store import ExpertKey


def keepers(keys: Sequence[ExpertKey], size: int) -> dict[ExpertKey, int]:
    """Of each expert the rank of an expert-data-parallel group that keeps its states: they take turns."""
    return {key: number % size for number, key in enumerate(keys)}


class SharedStates(ExpertStates):
    """See the top of the file. Call `join` before the first gradient.

    Args:
        rank, size: of this process in its expert-data-parallel group, and of the group.

    The rest is that of `ExpertStates`; the records of experts that other ranks keep need no optimizer states.
    """

    def __init__(
        self,
        keys: Sequence[ExpertKey],
        shape: ExpertShape,
        dtype: torch.dtype,
        device: torch.device,
        records: Records,
        rank: int,
        size: int,
    ) -> None:
        super().__init__(keys, shape, dtype, device, records)
        self._rank, self._keepers = rank, keepers(keys, size)
        self.kept = {key: None for key, keeper in self._keepers.items() if keeper == rank}
        self._pieces = _pieces(self.keys, shape, rank, size)
        self._group: Any = None
        self._averaged_over = 1
        self._stale: dict[ExpertKey, None] = {}  # those that have made a step since their weights were here
        self._coming: dict[ExpertKey, Future[None]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def join(self, ranks: int, group: Any) -> None:
        """Takes the first rank's weights: the ranks may have started with others, or one of them have loaded some."""
        self._averaged_over, self._group = ranks, group
        with self._beside():
            self._send(dict.fromkeys(self.keys, 0))

    def reduce(self) -> None:
        self.finish()  # or the step of an expert that nobody has asked for since would take the next gradient
        filling: deque[Callable[[], None]] = deque()
        with self._beside():
            for key in self.keys:
                buffer = self.gradient_buffer()
                filled = self._workers.submit(ARRIVE, partial(self._fill, key, buffer, self._so_far()))
                filling.append(partial(self._reduce, key, buffer, filled))
                if len(filling) > 1:  # one is filled while another one is on its way
                    filling.popleft()()
            for launch in filling:
                launch()

    def gather(self, layer: int) -> None:
        with self._beside():
            self._send({key: self._keepers[key] for key in self._stale if key.layer == layer})

    def step(self, factor: Tensor, kind: Callable[..., torch.optim.Optimizer], options: Mapping[int, Any]) -> None:
        super().step(factor, kind, options)
        self._coming, self._stale = {}, dict.fromkeys(self.keys)

    def write(self, key: ExpertKey, states: Mapping[str, Mapping[str, Tensor]], steps: float = 0.0) -> None:
        super().write(key, states, steps)
        self._stale.pop(key, None)

    def weights(self, key: ExpertKey) -> dict[str, Tensor]:
        if key in self._stale and key not in self.kept:
            raise CheckpointError(
                "state_dict: after a step the weights of experts come to this rank with the next forward pass; make "
                "one on all ranks before, or call scmoe_ds.checkpoint.save or scmoe_ds.save_pretrained"
            )
        return super().weights(key)

    def _send(self, senders: Mapping[ExpertKey, int]) -> None:
        """All ranks get the weights of experts, one after another; of each the rank of the group that has them."""
        own = [key for key, sender in senders.items() if sender == self._rank]
        loads = map(self._loading, own)  # lazily: one is under way while another one is waited for
        coming = deque(islice(loads, 1))
        for key, sender in senders.items():
            if sender == self._rank:
                coming.extend(islice(loads, 1))
                buffer, arrival = coming.popleft()
                arrival.wait()
            else:
                buffer = self.gradient_buffer()
            source = dist.get_global_rank(self._group, sender)
            work = dist.broadcast(buffer[: self.shape.elements], source, group=self._group, async_op=True)
            task = self._workers.submit(ARRIVE, partial(self._receive, key, buffer, work, sender == self._rank))
            self._arrivals.append(task)
            if sender != self._rank:
                self._coming[key] = task
            self._stale.pop(key, None)

    def _loading(self, key: ExpertKey) -> tuple[Tensor, Arrival]:
        buffer = self.gradient_buffer()
        return buffer, self.load({f"{key.layer}.{key.expert}": buffer}, self._after_this())

    # On the workers

    def _fill(
        self, key: ExpertKey, buffer: Tensor, ready: torch.cuda.Event | None, room: Room
    ) -> torch.cuda.Event | None:
        """This rank's part of the mean, in a buffer."""
        with self._turn(key, room) as record:
            self._behind(ready)
            if key in self._norms:
                room.moving.append(self.records.read(record, GRADIENT, buffer))
                room.settle()
                buffer.div_(self._averaged_over)
            else:
                buffer.zero_()
            return self._so_far()

    def _reduce(self, key: ExpertKey, buffer: Tensor, filled: Future[torch.cuda.Event | None]) -> None:
        self._behind(filled.result())
        work = dist.all_reduce(buffer[: self.shape.elements], group=self._group, async_op=True)
        self._keeping[key] = self._workers.submit(ARRIVE, partial(self._keep_mean, key, buffer, work))

    def _keep_mean(self, key: ExpertKey, buffer: Tensor, work: Any, room: Room) -> None:
        try:
            with self._turn(key, room) as record:
                work.wait()
                pieces = self._pieces[key]
                self._norms[key] = [None if piece is None else room.norm(buffer[piece]) for piece in pieces]
                if key in self.kept:
                    room.moving.append(self.records.write(record, GRADIENT, buffer))
        finally:
            self._buffers.put((buffer, self._so_far()))

    def _receive(self, key: ExpertKey, buffer: Tensor, work: Any, is_sender: bool, room: Room) -> None:
        try:
            with self._turn(key, room) as record:
                work.wait()
                if not is_sender:
                    low = LOW if room.low is not None else WEIGHTS
                    room.moving.append(self.records.write(record, low, buffer))
                if not is_sender and key in self.kept and room.low is not None:  # at the start
                    room.states[WEIGHTS][: self.shape.elements].copy_(buffer[: self.shape.elements])
                    room.moving.append(self.records.write(record, WEIGHTS, room.states[WEIGHTS]))
        finally:
            self._buffers.put((buffer, self._so_far()))

    def _norms_of(self, key: ExpertKey, gradient: Tensor, room: Room) -> list[Tensor | None]:
        """Of the mean alone, which is not known yet."""
        return []

    def _arrive(self, key: ExpertKey, *arguments: Any) -> None:
        if key in self._coming:
            self._coming[key].result()
        super()._arrive(key, *arguments)

    def _beside(self) -> AbstractContextManager[Any]:
        """On a GPU, a stream that only what is sent and received waits for."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _pieces(keys: Sequence[ExpertKey], shape: ExpertShape, rank: int, size: int) -> dict[ExpertKey, list[slice | None]]:
    """Of each part of an expert the elements whose norm ZeRO-1 would take on this rank, None: none of them.

    ZeRO-1 puts the parameters of a group one behind the other, and cuts that into equal shares of an even number of
    elements. Its norm is a sum of the shares' in fp32, so that others have other last bits.
    """
    found: dict[ExpertKey, list[slice | None]] = {key: [None] * len(shape.parts) for key in keys}
    for group, place in shape.groups.items():
        of_expert = place.stop - place.start
        share = -(-of_expert * len(keys) // (2 * size)) * 2
        for number, key in enumerate(keys):
            moved = number * of_expert - place.start - rank * share  # from the expert's buffer to the share
            for index, part in enumerate(shape.parts):
                first, last = max(part.start, -moved), min(part.end, share - moved)
                if part.group == group and first < last:
                    found[key][index] = slice(first, last)
    return found
