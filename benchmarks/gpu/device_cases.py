"""The cases of the simulated device on a real one: the same numbers, and no race.

One card has no other rank. The transfers are the stand-in's, on a stream of its own. So the streams, events and buffers
of a run on several cards are at work, and TORCH_CUDA_SANITIZER=1 watches them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import stand_in
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from scmoe_ds.engine import connect
from scmoe_ds.trace.recorder import Recorder
from tests.simulated_gpu import cases as simulated
from tests.simulated_gpu.cases import Case

CPU = torch.device("cpu")
TOLERANCES = {"fp8": 5e-2, "bf16": 2e-2, None: 1e-3}
"""By the number format on the wire: the most that a result may be off, relative to its largest value."""

Move = Callable[[Any], Any]


def cases() -> list[Case]:
    """The simulated device's, on one rank; those that differ in the layout alone are one."""
    alone = dict(tensor_parallel=1, expert_parallel=1, method="collective", capability=(9, 0), dropout=0.0)
    return list(dict.fromkeys(replace(case, **alone) for case in simulated.covering()))


def run(notes: Notes, setting: Setting) -> None:
    """The step: all cases; a rehearsal takes one in nine."""
    connect()
    torch.backends.cuda.matmul.allow_tf32 = False
    right, wrong = 0, 0
    for case in itertools.islice(cases(), 0, None, setting.size(1, 9)):
        problem = problem_of(case, setting.device)
        right, wrong = right + (problem is None), wrong + (problem is not None)
        if problem is not None:
            notes.row("Cases that are wrong", case=str(case), problem=problem)
        notes.number("cases on the device: right", right)
        notes.number("cases on the device: wrong", wrong)
    notes.row("The simulated device's cases on this one", right=right, wrong=wrong)


def problem_of(case: Case, device: torch.device, move: Move | None = None) -> str | None:
    """What is wrong with a case on a device; None if nothing is.

    In fp32 it is compared with the CPU. In bf16 another rounding may send a token to another expert: there it is
    compared with blocking transfers on the same device.

    Args:
        move: brings a module or tensor to the device; default: `to`. The simulated device has its own.
    """
    move = move or (lambda what: what.to(device))
    try:
        in_fp32 = case.dtype == torch.float32
        expected = results(case, CPU, lambda what: what) if in_fp32 else results(case, device, move, overlap=False)
        found = results(case, device, move)
        worst = max(off(here, there) for here, there in zip(expected, found, strict=True))
    except Exception as error:  # a race of the sanitizer among them; a broken device ends every later case, too
        return f"{type(error).__name__}: {error}"
    tolerance = max(TOLERANCES[case.wire_dtype], TOLERANCES[None if in_fp32 else "bf16"])
    return None if worst <= tolerance else f"off by {worst:.1e} of the largest value"


def results(case: Case, device: torch.device, move: Move, overlap: bool = True) -> list[Tensor | None]:
    """Outputs and all gradients of one pass of the case's pair, on the host."""
    pair = simulated.build(case)
    move(pair)
    stand_in.use([pair.layer])
    pair.schedule = replace(pair.schedule, overlap=overlap)
    if case.recorded:
        pair.recorder = Recorder(device).pair(0)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(2, 12, 16, generator=generator).to(case.dtype)
    mask = move(torch.rand(2, 12, generator=generator) > 0.3) if case.masked else None
    with _numbers_of_the_host():
        passes = simulated.results(pair, move(hidden).requires_grad_(), mask)
        return [each if each is None else each.detach().cpu() for each in itertools.chain(*passes)]


@contextmanager
def _numbers_of_the_host() -> Iterator[None]:
    """The gate draws which tokens are dropped: on every device the same ones."""
    rand = torch.rand

    def drawn(*size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return rand(*size, dtype=dtype).to(device)

    with mock.patch.object(torch, "rand", drawn):
        yield


def off(expected: Tensor | None, found: Tensor | None) -> float:
    """Largest difference, relative to the largest value; infinite if one is missing or not a number."""
    if expected is None or found is None:
        return 0.0 if expected is found else float("inf")
    expected, found = expected.double(), found.double()
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    return difference if difference == difference else float("inf")
