"""Pairs of blocks on one card, as the steps need them: their step, their parts in a trace, their schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.gpu.chrome_trace import profiled
from benchmarks.gpu.layers import settings_of
from benchmarks.gpu.setting import LayerShape
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.make_pairs import make_pair
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.parallel.process import device as own_device
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.times import OperatorTimes
from scmoe_ds.trace.recorder import SILENT, Recorder


def build(
    shape: LayerShape, sequence: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, **section: Any
) -> StagedPair:
    """A pair of the shape, the same weights for the same section. A world of one: nothing is sent yet."""
    fields = {"num_experts": shape.num_experts, "capacity_factor": shape.capacity_factor, **section}
    config = ScMoEConfig.from_deepspeed({"scmoe": fields})
    run = make_pair(settings_of(shape, sequence), config, shape.num_experts, config.position, sequence)
    assert isinstance(run, StagedPair)
    initialize_parameters(run, 3, 0.02, 2)
    run.layer.set_deepspeed_parallelism()
    return run.to(device, dtype)


def tokens(shape: LayerShape, device: torch.device, count: int, sequence: int) -> Tensor:
    """Fresh random input, [sequences, S, D]."""
    size = (max(count // sequence, 1), sequence, shape.hidden_size)
    return torch.randn(size, device=device, dtype=torch.bfloat16).requires_grad_()


def training_step(run: StagedPair, hidden: Tensor) -> Callable[[], None]:
    """Forward and backward pass, without an optimizer."""
    gradient = torch.randn_like(hidden)

    def step() -> None:
        output = run(hidden)
        torch.autograd.backward([output.hidden, output.l_aux], [gradient, torch.ones_like(output.l_aux)])
        run.zero_grad(set_to_none=True)
        hidden.grad = None

    return step


def calibrate(run: StagedPair, step: Callable[[], None], device: torch.device) -> OperatorTimes:
    """Times the parts as a training run does, and gives the pair the schedule that follows. Needs a transport."""
    calibrator = Calibrator([run], OverlapConfig(num_chunks=1, calibration_steps=3), device)
    while calibrator.calibrating:
        calibrator.begin()
        step()
    return calibrator.times[0]


@contextmanager
def traced(pair: StagedPair, path: Path) -> Iterator[None]:
    """Profiles the block, with the pair's parts named in the trace."""
    pair.recorder = Annotations(own_device()).pair(0)
    try:
        with profiled(path, own_device()):
            yield
    finally:
        pair.recorder = SILENT


def finish() -> None:
    """Waits for the device."""
    if own_device().type == "cuda":
        torch.cuda.synchronize()


class Annotations(Recorder):
    """A recorder that takes no times: it names the parts of a pair in the profiler's trace, forward and backward."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._ranges: dict[Any, Any] = {}

    def start(self, key: Any) -> None:
        """A part begins, on the thread that runs it."""
        _, name, _, _, phase, _ = key
        self._ranges[key] = record_function(f"{name}, {phase}")
        self._ranges[key].__enter__()

    def end(self, key: Any) -> None:
        """It is over."""
        if key in self._ranges:
            self._ranges.pop(key).__exit__(None, None, None)
