"""Kernels that memory bounds, by bytes; what a launch costs the host; the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import ColdClock, Run
from scmoe_ds.probe.sizes import Sizes
from scmoe_ds.probe.trials import Computed, Copy, Ladder, Launch, Trial
from scmoe_ds.trace.recorder import PHASES, Phase

LAUNCHES = 64

Operator = Callable[..., Tensor]


def passes(bench: Bench) -> Iterator[Ladder]:
    """Every kind, forward and backward."""
    norm = nn.LayerNorm(bench.sizes.hidden).to(bench.device, bench.dtype)
    yield _ladder(bench, "pointwise", None, torch.add, 2, 3)
    for phase in PHASES:
        backward = phase == "backward"  # reads the gradient and writes another beside what the operator read
        yield _ladder(bench, "activation", phase, F.gelu, 1, 3 if backward else 2)
        yield _ladder(bench, "SwiGLU", phase, _swiglu, 1, 2.5 if backward else 1.5)  # its output is half as wide
        yield _ladder(bench, "reduction", phase, norm, 1, 3 if backward else 2, parameters=list(norm.parameters()))
        yield _ladder(bench, "loss", phase, _loss, 1, 2, bench.sizes.vocabulary)
        yield _ladder(bench, "rows", phase, _gather, 1, 2)


def _swiglu(inner: Tensor) -> Tensor:
    return kernels_of(inner).swiglu(inner)


def _gather(rows: Tensor) -> Tensor:
    """Permuted rows: with every other one from the second half."""
    count = rows.shape[0]
    order = torch.arange(count, device=rows.device).view(2, -1).t().flatten() if count > 1 else rows.new_zeros(1).long()
    return rows.index_select(0, order)


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device))


def _ladder(
    bench: Bench,
    kind: str,
    phase: Phase | None,
    operator: Operator,
    inputs: int,
    traffic: float,
    width: int = 0,
    parameters: Sequence[Tensor] = (),
) -> Ladder:
    """
    Args:
        inputs: of the operator, [numbers / width, width] each.
        width: 0: the usual one.
        traffic: tensors of that size that it reads and writes.
        parameters: of the operator, whose gradients are computed too.
    """

    width = width or bench.sizes.hidden

    def prepared(numbers: int) -> Callable[[], Run]:
        names = ("rows", "weight")[:inputs]

        def prepare() -> Run:
            given = [bench.take(name, numbers // width, width).detach() for name in names]
            if phase != "backward":
                return Run(lambda: operator(*given), given[:1])
            for each in given:
                each.requires_grad_()
            output = operator(*given)
            gradient = bench.take("gradient", *output.shape)
            return Run(partial(torch.autograd.grad, output, [*given, *parameters], gradient), (gradient,))

        return prepare

    trials: list[Trial[Computed]] = []
    for numbers in bench.sizes.numbers:
        if bench.fits(numbers):
            moved = traffic * numbers * bench.width
            trials.append(bench.trial(kind, [(int(moved), 1, 1)], phase, prepared(numbers), moved=moved))
    return trials


def launches(clock: ColdClock) -> Iterator[Ladder]:
    """Small additions one after another, recorded for the gradient as in training, and their gradients."""
    start = torch.zeros(1, device=clock.device, requires_grad=True)

    def forward() -> Tensor:
        chain: Tensor = start
        for _ in range(LAUNCHES):
            chain = chain + 1.0
        return chain

    def backward() -> float:
        chain = forward()
        return clock.host(lambda: torch.autograd.grad(chain, start)) / LAUNCHES

    yield [Trial(Launch("forward"), lambda: clock.host(forward) / LAUNCHES)]
    yield [Trial(Launch("backward"), backward)]


def copies(clock: ColdClock, sizes: Sizes) -> Ladder:
    """Copies that no cache holds."""

    def trial(nbytes: int) -> Trial[Copy]:
        source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=clock.device) for _ in range(2))
        return Trial(Copy(nbytes), lambda: clock.cold(Run(lambda: target.copy_(source))))

    return [trial(nbytes) for nbytes in sizes.copied]
