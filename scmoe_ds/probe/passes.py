"""Kernels that memory bounds, by bytes; what a launch costs the host; the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.moe.kernels import kernels_of
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import ColdClock, Run
from scmoe_ds.probe.trials import Computed, Copy, Ladder, Launch, Trial
from scmoe_ds.trace.recorder import Phase

LAUNCHES = 64
UPDATED = 8
"""Numbers of fp32 that Adam moves per parameter, as `simulate` counts them."""


@dataclass(frozen=True)
class Pass:
    """An operator that passes once through tensors of one size.

    Attributes:
        kind: as in `simulate.work.Kernel`.
        operator: of `inputs` tensors [rows, width].
        forward, backward: how many tensors of this size it reads and writes, as `simulate` counts them. A backward pass
            reads a gradient and writes another beside what the forward pass has read. None: nobody needs one.
        parameters: whose gradients are computed, too.
    """

    kind: str
    operator: Callable[..., Tensor]
    width: int
    forward: float
    backward: float | None
    numbers: Sequence[int]
    inputs: int = 1
    parameters: tuple[Tensor, ...] = ()


def passes(bench: Bench) -> Iterator[Ladder]:
    """Every kind, forward and backward."""
    sizes, width = bench.sizes, bench.sizes.hidden
    norm = bench.place(nn.LayerNorm(width))
    small, large = sizes.numbers[:-1], sizes.numbers[-1:]  # norms pass through hidden states, the loss through logits
    for each in (
        Pass("pointwise", torch.add, width, 3, None, sizes.numbers, inputs=2),
        Pass("activation", F.gelu, width, 2, 3, sizes.numbers),
        Pass("gated activation", _swiglu, width, 1.5, 2.5, sizes.numbers),  # half as wide as what it reads
        Pass("reduction", norm, width, 2, 5, small, parameters=tuple(norm.parameters())),
        Pass("reduction", _loss, sizes.vocabulary, 2, 4, large),
        Pass("rows", partial(_gathered, {}), width, 2, None, sizes.numbers),
    ):
        yield _ladder(bench, each, "forward" if each.backward else None, each.forward)
        if each.backward:
            yield _ladder(bench, each, "backward", each.backward)


def _swiglu(inner: Tensor) -> Tensor:
    return kernels_of(inner).swiglu(inner)


def _gathered(orders: dict[int, Tensor], rows: Tensor) -> Tensor:
    """Rows of two halves in turn. The backward pass of a permutation gathers, too (moe/decode.py).

    Args:
        orders: by number of rows; one that is not there yet is added.
    """
    count = rows.shape[0]
    if count not in orders:
        orders[count] = torch.arange(count, device=rows.device) * (count // 2 + 1) % count
    return rows.index_select(0, orders[count])


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device))


def _ladder(bench: Bench, what: Pass, phase: Phase | None, traffic: float) -> Ladder:
    """
    Args:
        traffic: of this phase.
    """

    def forward(numbers: int) -> tuple[list[Tensor], Tensor]:
        names = ("rows", "weight")[: what.inputs]
        given = [bench.take(name, numbers // what.width, what.width).detach() for name in names]
        if what.backward:
            for each in given:
                each.requires_grad_()
        return given, what.operator(*given)

    def backward(numbers: int) -> Callable[[], object]:
        given, output = forward(numbers)
        return partial(torch.autograd.grad, output, [*given, *what.parameters], bench.take("gradient", *output.shape))

    def prepared(numbers: int) -> Callable[[], Run]:
        shape = numbers // what.width, what.width

        def prepare() -> Run:
            if phase == "backward":
                return Run(backward(numbers), (bench.take("gradient", *shape),), backward(what.width))
            return Run(partial(forward, numbers), (bench.take("rows", *shape),), partial(forward, what.width))

        return prepare

    return [
        bench.trial(what.kind, [(round(traffic * numbers * bench.width), 1, 1)], phase, prepared(numbers), moved=moved)
        for numbers in what.numbers
        if bench.fits(numbers)
        for moved in (traffic * numbers * bench.width,)
    ]


def updates(bench: Bench) -> Ladder:
    """Adam's step over one tensor of fp32, as ZeRO has its parameters: torch's, on a GPU fused as DeepSpeed's."""

    def trial(numbers: int) -> Trial[Computed]:
        parameter = nn.Parameter(torch.zeros(numbers, device=bench.device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=bench.device.type == "cuda")
        moved = 4.0 * UPDATED * numbers
        return bench.trial("optimizer", [(round(moved), 1, 1)], None, lambda: Run(optimizer.step), moved=moved)

    return [trial(numbers) for numbers in bench.sizes.numbers[1:] if bench.fits(numbers)]


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


def copies(bench: Bench) -> Ladder:
    """Copies that no cache holds."""
    smallest, *larger = bench.sizes.copied

    def trial(nbytes: int) -> Trial[Copy]:
        source, target = (torch.ones(nbytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return Trial(Copy(nbytes), lambda: bench.clock.cold(Run(lambda: target.copy_(source))))

    return [trial(nbytes) for nbytes in (smallest, *(each for each in larger if each <= 4 * bench.most_bytes))]
