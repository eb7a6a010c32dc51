"""Every slot, chunk count, dispatch, number of choices and kind of pair on the device: the CPU's numbers, and no race.

The transfers are the stand-in's, on a stream of its own. So the streams, events and buffers of a run on several cards
are at work, and TORCH_CUDA_SANITIZER=1 watches them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import stand_in
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import StagedPair, make_pair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.trace.recorder import Recorder

EXPERTS, SEQUENCE = 4, 32
SETTINGS = GPTSettings(2, 64, 4, 64, SEQUENCE)
SLOTS: tuple[int | tuple[int, ...], ...] = (1, 2, 3, 4, (1, 2), (1, 3, 4))
EXACT_TOLERANCE, WIRE_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class Case:
    """One pair under one schedule.

    Attributes:
        section: fields of the "scmoe" section.
        schedule: when the experts run.
        recompute: None, "full" or "selective".
        recorded: whether a recorder listens.
    """

    section: dict[str, Any] = field(hash=False)
    schedule: Schedule
    recompute: str | None = None
    recorded: bool = False

    def __str__(self) -> str:
        fields = ", ".join(f"{name} {value}" for name, value in self.section.items())
        slots = "/".join(map(str, self.schedule.slots))
        rest = ["blocking"] * (not self.schedule.overlap) + ["recorded"] * self.recorded
        return ", ".join([fields, f"slots {slots}", *rest, *([f"recompute {self.recompute}"] * bool(self.recompute))])


def cases() -> Iterator[Case]:
    """All of them; the sections are valid, and no random number is drawn on the device."""
    for dispatch, k, dropping, slots in itertools.product(("exact", "padded"), (1, 2, 3), (True, False), SLOTS):
        section = {"dispatch": dispatch, "top_k": k, "drop_tokens": dropping, "capacity_factor": 0.6}
        yield Case(section, _schedule(slots))
    for dispatch, slots in itertools.product(("exact", "padded"), (2, (1, 2))):
        section, schedule = {"dispatch": dispatch}, _schedule(slots)
        yield Case(section | {"architecture": "dgmoe"}, schedule)
        yield Case(section | {"architecture": "overlapped_shared_expert"}, schedule)
        yield Case(section | {"architecture": "pipelined_topk"}, _schedule(1 if slots == 2 else (1, 1)))
        for wire in ("bf16", "fp8"):
            yield Case(section | {"wire_dtype": wire}, schedule)
        for recompute in ("full", "selective"):
            yield Case(section, schedule, recompute)
        yield Case(section, schedule, recorded=True)
        yield Case(section, Schedule(schedule.expert_slot, schedule.num_chunks, overlap=False))


def _schedule(slots: int | tuple[int, ...]) -> Schedule:
    return Schedule(slots, len(slots) if isinstance(slots, tuple) else 1)


def run(notes: Notes, setting: Setting) -> None:
    """The step: all cases; a rehearsal takes one in nine."""
    connect()
    torch.backends.cuda.matmul.allow_tf32 = False
    right, wrong = 0, 0
    for case in itertools.islice(cases(), 0, None, setting.size(1, 9)):
        problem = _problem(case, setting.device)
        right, wrong = right + (problem is None), wrong + (problem is not None)
        if problem is not None:
            notes.row("Cases that are wrong", case=str(case), problem=problem)
        notes.number("cases on the device: right", right)
        notes.number("cases on the device: wrong", wrong)
    notes.row("Cases on the device, against the CPU", right=right, wrong=wrong)


def _problem(case: Case, device: torch.device) -> str | None:
    """What is wrong with a case; None if nothing is."""
    expected = results(case, torch.device("cpu"))
    try:
        found = results(case, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a race of the sanitizer among them; a broken device ends every later case, too
        return f"{type(error).__name__}: {error}"
    tolerance = WIRE_TOLERANCE if "wire_dtype" in case.section else EXACT_TOLERANCE
    worst = max(_difference(here, there) for here, there in zip(expected, found, strict=True))
    return None if worst <= tolerance else f"off by {worst:.1e} of the largest value"


def results(case: Case, device: torch.device, move: Callable[[Any], Any] | None = None) -> list[Tensor]:
    """Output and all gradients of one pass of the case's pair.

    Args:
        move: brings a module or tensor to the device; default: `to`. The simulated device has its own.
    """
    move = move or (lambda what: what.to(device))
    config = ScMoEConfig.from_deepspeed({"scmoe": {"num_experts": EXPERTS, "use_rts": False, **case.section}})
    pair = make_pair(SETTINGS, config, EXPERTS, config.position, SEQUENCE)
    assert isinstance(pair, StagedPair)
    initialize_parameters(pair, 3, 0.1, 1)
    pair.layer.set_deepspeed_parallelism()
    move(pair)
    stand_in.use([pair.layer])
    pair.schedule, pair.recompute = case.schedule, case.recompute  # type: ignore[assignment]
    if case.recorded:
        pair.recorder = Recorder(device).pair(0)
    generator = torch.Generator().manual_seed(1)
    hidden = move(torch.randn(2, SEQUENCE, SETTINGS.hidden_size, generator=generator)).requires_grad_()
    output = pair(hidden)
    loss = output.hidden.float().square().mean() + output.l_aux
    return [output.hidden, *torch.autograd.grad(loss, [hidden, *pair.parameters()], materialize_grads=True)]


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    expected, found = expected.detach(), found.detach().cpu()
    scale = expected.abs().max().clamp(min=1e-3)
    difference = float((found - expected).abs().max() / scale)
    return difference if difference == difference else float("inf")  # nan compares with nothing
