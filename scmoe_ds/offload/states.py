"""Weights, gradients and optimizer states of trained experts, out of the device's memory.

Two workers move them, each with a stream of its own beside a GPU. A task belongs to one expert; the tasks of an expert
run one after another. What somebody waits for goes first:

    arrive   the weights into a slot of the store, with the step that is due          the window of the shortcut
    keep     a gradient, added to that of the micro-batches before                    the windows of the backward pass
    update   the step of an expert that nobody has asked for                          when nothing else is to be done

A step has the arithmetic of DeepSpeed's ZeRO-1: the gradient divided by the data-parallel ranks in the parameters'
dtype, clipped in fp32, torch's own optimizer on fp32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.offload.readers import Arrival
from scmoe_ds.offload.records import Records
from scmoe_ds.offload.room import FIRST, GRADIENT, LOW, SECOND, WEIGHTS, Room, sections
from scmoe_ds.offload.shape import ExpertShape
from scmoe_ds.offload.step import MOMENTS, Step, make_step
from scmoe_ds.offload.store import ExpertKey
from scmoe_ds.offload.turns import WORKERS, Turns
from scmoe_ds.offload.workers import Arriving, has_succeeded
from scmoe_ds.trace.migrations import MigrationWatch, noted

MASTER = "fp32"
"""The name of fp32 weights, as checkpoints have it."""
ARRIVE, _KEEP, _UPDATE = range(3)
"""What goes first."""


class ExpertStates(Turns):
    """The experts of all MoE layers of a rank; an `ExpertSource` for an `ExpertStore`.

    Args:
        keys: of all experts, in the order of the layers.
        shape: of every expert.
        dtype: of the parameters and their gradients.
        device: that computes.
        records: one for each expert, of `sections`.
        buffers: gradients that may be on their way at once.

    Attributes:
        kept: the experts whose steps this rank makes.
    """

    def __init__(
        self,
        keys: Sequence[ExpertKey],
        shape: ExpertShape,
        dtype: torch.dtype,
        device: torch.device,
        records: Records,
        buffers: int = 2,
    ) -> None:
        super().__init__(keys, shape, dtype, device, buffers)
        self.kept = dict.fromkeys(keys)
        self.records, self.tier = records, records.tier
        self.ranks = 1
        self.steps = dict.fromkeys(keys, 0.0)
        self._due: dict[ExpertKey, tuple[Step, bool]] = {}
        self._norms: dict[ExpertKey, list[Tensor | None]] = {}  # of the gradients since the last step
        self._keeping: dict[ExpertKey, Future[Any]] = {}
        self._updates: list[Future[Any]] = []
        self._arrivals: list[Future[Any]] = []  # those that are not over, and those that have failed

    @property
    def nbytes(self) -> int:
        """Device memory of gradients on their way and of the rooms."""
        wide = sections(self.shape, self.dtype)
        return self._buffers.qsize() * wide[GRADIENT] + WORKERS * sum(wide)

    # What the layers call

    def load(self, into: Mapping[str, Tensor], after: Arrival | None, watch: MigrationWatch | None = None) -> Arrival:
        """Brings an expert's weights into a slot's buffer; see `ExpertSource`. The step that is due comes first."""
        ((name, flat),) = into.items()
        arriving = Arriving(Future())
        key = ExpertKey(*map(int, name.split(".")))
        task = self._workers.submit(ARRIVE, partial(self._arrive, key, flat, after, watch, arriving.future))
        task.add_done_callback(arriving.tell)
        self._arrivals = [*(each for each in self._arrivals if not has_succeeded(each)), task]
        return arriving

    def keep(self, key: ExpertKey, buffer: Tensor) -> None:
        """Hands over a gradient, which is added to those since the last step. Returns at once."""
        if key in self._keeping:
            self._keeping[key].result()
        self._keeping[key] = self._workers.submit(_KEEP, partial(self._keep, key, buffer, self._so_far()))

    def gather(self, layer: int) -> None:
        """The weights of a layer's experts are those of their last step on this rank from now on. Collective."""

    # What the optimizer's step calls

    def join(self, ranks: int, group: Any) -> None:
        """Says over how many ranks gradients are averaged, and the expert-data-parallel group. Collective."""
        self.ranks = ranks

    def reduce(self) -> None:
        """The gradients are those of all ranks of the expert-data-parallel group from now on. Collective."""

    def norms(self, group: int) -> list[Tensor]:
        """The norm of each gradient of a group's parameters since the last step, [] fp64, expert after expert."""
        for each in self._keeping.values():
            each.result()
        for key in self._keeping:
            self._behind(self._ended.get(key))
        places = [place for place, part in enumerate(self.shape.parts) if part.group == group]
        nothing = [torch.zeros((), dtype=torch.float64, device=self.device)] * len(self.shape.parts)
        found = [self._norms.get(key, nothing)[place] for key in self.keys for place in places]
        return [each for each in found if each is not None]

    def step(
        self, factor: Tensor, kind: Callable[..., torch.optim.Optimizer], options: Mapping[int, Mapping[str, Any]]
    ) -> None:
        """All experts have a step before them, which they make at their next arrival or sooner.

        Args:
            factor, kind, options: of `Step`.
        """
        self.finish()
        step = Step(factor, self._so_far(), kind, {group: dict(each) for group, each in options.items()})
        self._due = {key: (step, key in self._norms) for key in self.kept}
        self.forget_gradients()
        self._updates = [self._workers.submit(_UPDATE, partial(self._update_if_due, key)) for key in self.kept]

    def forget_gradients(self) -> None:
        """The next gradients are the first of their step."""
        for each in self._keeping.values():
            each.result()  # or it would note its norm afterwards
        self._norms, self._keeping = {}, {}

    def finish(self) -> None:
        """Waits until no expert has a step before it, and nothing is on its way.

        Raises:
            ArgumentError: a file could not be read or written, now or before: no later state is right.
        """
        self._updates += [self._workers.submit(ARRIVE, partial(self._update_if_due, key)) for key in list(self._due)]
        for each in (*self._arrivals, *self._updates, *self._keeping.values()):
            each.result()
        self._arrivals, self._updates = [], []

    # What checkpoints call

    def weights(self, key: ExpertKey) -> dict[str, Tensor]:
        """Of each parameter, on the CPU, in its dtype."""
        buffer = self.gradient_buffer()
        try:
            self.load({f"{key.layer}.{key.expert}": buffer}, self._after_this()).wait()
            return {name: view.to("cpu", copy=True) for name, view in self.shape.views(buffer).items()}
        finally:
            self._buffers.put((buffer, self._so_far()))

    def read(self, key: ExpertKey) -> tuple[dict[str, dict[str, Tensor]], float]:
        """Of each parameter its fp32 weights and moments, on the CPU, and the number of steps that they are from."""
        self.finish()
        return self._workers.submit(ARRIVE, partial(self._read, key)).result(), self.steps[key]

    def write(self, key: ExpertKey, states: Mapping[str, Mapping[str, Tensor]], steps: float = 0.0) -> None:
        """Sets an expert. The weights are what they are in the parameters' dtype.

        Args:
            states: of each parameter its weights and, unless `steps` is 0, its moments.
        """
        self.finish()
        self._workers.submit(ARRIVE, partial(self._write, key, states, steps)).result()

    # On the workers

    def _arrive(
        self,
        key: ExpertKey,
        flat: Tensor,
        after: Arrival | None,
        watch: MigrationWatch | None,
        arrived: Future[torch.cuda.Event | None],
        room: Room,
    ) -> None:
        with self._turn(key, room) as record:
            if after is not None:
                after.wait()
            with noted(watch, "read", 0, flat.nbytes):
                if key in self._due:
                    self._update(key, record, room, flat)
                else:
                    low = LOW if room.low is not None else WEIGHTS
                    room.moving.append(self.records.read(record, low, flat))
                    room.settle()
            arrived.set_result(self._so_far())  # `finish` alone waits for what is written back

    def _keep(self, key: ExpertKey, buffer: Tensor, ready: torch.cuda.Event | None, room: Room) -> None:
        try:
            with self._turn(key, room) as record:
                self._behind(ready)
                if key in self._norms:
                    room.moving.append(self.records.read(record, GRADIENT, room.gradient))
                    room.settle()
                    buffer.add_(room.gradient)
                self._norms[key] = self._norms_of(key, buffer, room)
                room.moving.append(self.records.write(record, GRADIENT, buffer))
        finally:
            self._buffers.put((buffer, self._so_far()))

    def _norms_of(self, key: ExpertKey, gradient: Tensor, room: Room) -> list[Tensor | None]:
        """Of each part, of the ranks' mean."""
        parts = (gradient[part.start : part.end] for part in self.shape.parts)
        return [room.norm(each / self.ranks if self.ranks > 1 else each) for each in parts]

    def _update_if_due(self, key: ExpertKey, room: Room) -> None:
        with self._turn(key, room) as record:
            if key in self._due:
                self._update(key, record, room, None)

    def _update(self, key: ExpertKey, record: int, room: Room, flat: Tensor | None) -> None:
        """One step of an expert, and its new weights in a slot's buffer."""
        step, has_gradient = self._due[key]
        room.moving = [self.records.read(record, WEIGHTS, room.states[WEIGHTS])]
        if has_gradient:
            room.moving.append(self.records.read(record, GRADIENT, room.gradient))
        for section in (FIRST, SECOND):
            if self.steps[key]:
                room.moving.append(self.records.read(record, section, room.states[section]))
            else:
                room.states[section].zero_()
        room.settle()
        gradient = self._clipped(room, step, has_gradient)
        make_step(self.shape, step, room.states, gradient, self.steps[key])
        weights = room.states[WEIGHTS]
        if flat is not None:
            flat[: self.shape.elements].copy_(weights[: self.shape.elements])
        self.steps[key] += 1
        del self._due[key]
        room.moving = [self.records.write(record, section, room.states[section]) for section in range(3)]
        if room.low is not None:
            room.low[: self.shape.elements].copy_(weights[: self.shape.elements])
            room.moving.append(self.records.write(record, LOW, room.low))

    def _clipped(self, room: Room, step: Step, has_gradient: bool) -> Tensor:
        # Even without a gradient: the step computes where norms may be that the optimizer reads until then.
        self._behind(step.ready)
        if not has_gradient:
            return room.wide.zero_()
        if self.ranks > 1:
            room.gradient.div_(self.ranks)
        if room.wide is not room.gradient:
            room.wide[: self.shape.elements].copy_(room.gradient[: self.shape.elements])
        if step.factor.is_cuda:  # it is of another stream's memory, which might give it away before it is read
            step.factor.record_stream(torch.cuda.current_stream(self.device))
        return room.wide.mul_(step.factor)

    def _read(self, key: ExpertKey, room: Room) -> dict[str, dict[str, Tensor]]:
        with self._turn(key, room) as record:
            count = 3 if self.steps[key] else 1
            room.moving = [self.records.read(record, each, room.states[each]) for each in range(count)]
            room.settle()
            found: dict[str, dict[str, Tensor]] = {part.name: {} for part in self.shape.parts}
            for name, state in zip((MASTER, *MOMENTS)[:count], room.states, strict=False):
                for part, view in self.shape.views(state).items():
                    found[part][name] = view.to("cpu", copy=True)
            return found

    def _write(self, key: ExpertKey, states: Mapping[str, Mapping[str, Tensor]], steps: float, room: Room) -> None:
        with self._turn(key, room) as record:
            names = (MASTER, *MOMENTS) if steps and key in self.kept else (MASTER,)
            for name, state in zip(names, room.states, strict=False):
                self.shape.put(state, {part: each[name] for part, each in states.items()})
            written = range(len(names)) if room.low is None or key in self.kept else ()
            room.moving = [self.records.write(record, section, room.states[section]) for section in written]
            if room.low is not None:
                room.low[: self.shape.elements].copy_(room.states[WEIGHTS][: self.shape.elements])
                room.moving.append(self.records.write(record, LOW, room.low))
            self.steps[key] = steps
