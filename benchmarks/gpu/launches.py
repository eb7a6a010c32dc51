"""Launches and host waits of one pair, counted in the profiler's trace, against the budgets of the simulated device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import pairs, stand_in
from benchmarks.gpu.chrome_trace import ChromeTrace, measured_step
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.pairs import finish, traced
from benchmarks.gpu.setting import LayerShape, Setting, layer_shapes
from scmoe_ds.engine import connect
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.process import device

PHASES = ("forward", "backward")
WARM_UP = 3


def run(notes: Notes, setting: Setting) -> None:
    """The step: launches of the pair that the budgets describe; host waits of both dispatches, one chunk and two."""
    connect()
    torch.manual_seed(0)
    waits: dict[str, list[int]] = {phase: [] for phase in PHASES}
    for dispatch in ("exact", "padded"):
        for chunks in (1, 2):
            pair, hidden = pair_of_budgets(setting, 2, dispatch=dispatch)
            stand_in.use([pair.layer])
            pair.schedule = Schedule((2,) * chunks, chunks)
            trace = profile_passes(pair, hidden, setting.file(f"_launches_{dispatch}_{chunks}.json.gz"))
            if dispatch == "exact" and chunks == 1:
                _note_launches(notes, trace)
            for phase in PHASES:
                found = trace.host_waits(phase)
                waits[phase].append(found.total())
                names = ", ".join(f"{name} {count}" for name, count in found.items()) or "none"
                cells = {"dispatch": dispatch, "chunks": chunks, "phase": phase, "waits": found.total()}
                notes.row("Host waits of one MoE layer", **cells, where=names)
    for phase in PHASES:
        notes.number(f"host waits per MoE layer, {phase}", max(waits[phase]))


def pair_of_budgets(setting: Setting, num_experts: int, **section: object) -> tuple[StagedPair, Tensor]:
    """The pair that the budgets describe, top-1 with two experts on each rank, in bf16; and its input."""
    medium, sequence = layer_shapes(setting)[0], setting.size(2048, 12)
    shape = LayerShape(medium.name, medium.settings, num_experts, medium.capacity_factor)
    pair = pairs.build(shape, sequence, device(), **section)
    return pair, pairs.tokens(shape, device(), setting.size(4096, 24), sequence)


def profile_passes(pair: StagedPair, hidden: Tensor, path: Path) -> ChromeTrace:
    """The trace of one forward and one backward pass, which are ranges of these names; the device rests in between."""
    step = pairs.training_step(pair, hidden)
    for _ in range(WARM_UP):
        step()
    with traced(pair, path):
        step()  # the profiler's own start
        finish()
        with measured_step("forward"):
            output = pair(hidden)
        finish()
        gradients = [torch.randn_like(output.hidden), torch.ones_like(output.l_aux)]
        finish()
        with measured_step("backward"):
            torch.autograd.backward([output.hidden, output.l_aux], gradients)
        finish()
    return ChromeTrace.read(path)


def _note_launches(notes: Notes, trace: ChromeTrace) -> None:
    for phase in PHASES:
        found = trace.launches(phase)
        notes.number(f"launches per pair, {phase}", found.total())
        if phase == "forward":
            notes.number("launches of the gate, forward", found["gate, forward"])
        for part, count in [("all parts", found.total()), *found.most_common()]:
            name = part.removesuffix(f", {phase}")
            notes.row("Launches of one pair, by part", phase=phase, part=name, launches=count)
        if trace.on_gpu:
            notes.number(f"kernels per pair, {phase}", len(trace.kernels(within=phase)))
