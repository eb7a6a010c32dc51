"""Matrix products by size, in the three forms of a linear layer, and experts as this package computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from scmoe_ds.moe.experts import run_experts
from scmoe_ds.probe.bench import Bench
from scmoe_ds.probe.clock import Run
from scmoe_ds.probe.trials import Computed, Ladder, Shape, Trial
from scmoe_ds.trace.recorder import PHASES, Phase

Operands = tuple[Tensor, Tensor, Tensor | None]
"""Both matrices, of which the first has just been written, and a bias or none."""
_LITTLE = (4, 8, 4)


def products(bench: Bench) -> Iterator[Ladder]:
    """A linear layer with its bias forward, and the gradients of its input and of its weight."""

    def layer(rows: int, inner: int, columns: int) -> Operands:
        return bench.take("rows", rows, inner), bench.take("weight", columns, inner).t(), bench.take("bias", columns)

    def of_input(rows: int, inner: int, columns: int) -> Operands:
        return bench.take("rows", rows, inner), bench.take("weight", inner, columns), None

    def of_weight(rows: int, inner: int, columns: int) -> Operands:
        return bench.take("rows", inner, rows).t(), bench.take("weight", inner, columns), None

    for first, second in product(bench.sizes.widths, bench.sizes.widths):
        yield _ladder(bench, "forward", layer, [(rows, first, second) for rows in bench.sizes.rows])
        yield _ladder(bench, "backward", of_input, [(rows, first, second) for rows in bench.sizes.rows])
        yield _ladder(bench, "backward", of_weight, [(first, rows, second) for rows in bench.sizes.rows])


def _ladder(bench: Bench, phase: Phase, operands: Callable[[int, int, int], Operands], shapes: list[Shape]) -> Ladder:
    def prepared(shape: Shape) -> Callable[[], Run]:
        def prepare() -> Run:
            of_shape, little = operands(*shape), operands(*_LITTLE)
            return Run(lambda: _product(*of_shape), (of_shape[0],), lambda: _product(*little))

        return prepare

    return [
        bench.trial("product", [shape], phase, prepared(shape), flops=2.0 * shape[0] * shape[1] * shape[2])
        for shape in shapes
        if bench.fits(shape[0] * shape[1], shape[1] * shape[2], shape[0] * shape[2])
    ]


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


class _Projections(nn.Module):
    """An expert whose activation takes no time: what remains are its products, and what the package does for them."""

    two_projections = True

    def __init__(self, hidden: int, inside: int) -> None:
        super().__init__()
        self.input, self.output = nn.Linear(hidden, inside, bias=False), nn.Linear(inside, hidden, bias=False)

    def activate(self, inner: Tensor) -> Tensor:
        return inner

    def forward(self, rows: Tensor) -> Tensor:
        return self.output(self.activate(self.input(rows)))


def experts(bench: Bench) -> Iterator[Ladder]:
    """Several local experts, forward and backward, by rows of each."""
    for local, hidden, inside in bench.sizes.experts:
        if not bench.fits(local * hidden * inside, local * bench.sizes.rows[-2] * max(hidden, inside)):
            continue
        members = bench.place(Experts(_Projections(hidden, inside), local))
        for phase in PHASES:
            yield [_expert_trial(bench, members, phase, rows, hidden, inside) for rows in bench.sizes.rows[:-1]]


def _expert_trial(bench: Bench, members: Experts, phase: Phase, rows: int, hidden: int, inside: int) -> Trial[Computed]:
    local = len(members.deepspeed_experts)

    def forward(count: int) -> tuple[Tensor, Tensor]:
        incoming = bench.take("rows", local * count, hidden).detach().requires_grad_()
        return incoming, run_experts(members, incoming, [count] * local)

    def backward(count: int) -> Callable[[], object]:
        incoming, output = forward(count)
        gradient = bench.take("gradient", local * count, hidden)
        return partial(torch.autograd.grad, output, [incoming, *members.parameters()], gradient)

    def prepare() -> Run:
        if phase == "forward":
            return Run(lambda: forward(rows), (bench.take("rows", local * rows, hidden),))
        return Run(backward(rows), (bench.take("gradient", local * rows, hidden),))

    both = [(rows, hidden, inside), (rows, inside, hidden)]
    weights = [(hidden, rows, inside), (inside, rows, hidden)]
    once = 4.0 * local * rows * hidden * inside
    if phase == "forward":
        return bench.trial("grouped product", both, phase, prepare, flops=once)
    return bench.trial("grouped product", [*both, *weights], phase, prepare, flops=2 * once)
