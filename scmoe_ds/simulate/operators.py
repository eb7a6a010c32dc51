"""Kernels that operators are made of, forward and backward, and what each keeps in between.

Counted is what runs on a GPU with fused kernels where this package and torch have them: one launch for a norm, a
dropout, an attention. Bytes are those that cross the GPU's memory once, read and written.

Shape suffixes: T tokens, I/O in/out of a product, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from scmoe_ds.simulate.work import Kernel, Kind, Part, Reduced, Work

_FP32 = 4


@dataclass(frozen=True)
class Cost:
    """What a part of an operator takes.

    Attributes:
        forward, backward: in their order.
        kept: bytes from the forward pass for the backward pass.
    """

    forward: tuple[Part, ...] = ()
    backward: tuple[Part, ...] = ()
    kept: float = 0.0

    def __add__(self, behind: Cost) -> Cost:
        """Both, one after the other; backward in the opposite order."""
        return Cost(self.forward + behind.forward, behind.backward + self.backward, self.kept + behind.kept)

    def without_backward(self) -> Cost:
        """Of a pass without gradients."""
        return Cost(self.forward)

    def repeated(self, kept: float) -> Cost:
        """With a backward pass that computes the forward pass again, of `kept` bytes."""
        return Cost(self.forward, self.forward + self.backward, kept)

    def named(self, name: str) -> Work:
        return Work(name, self.forward, self.backward, self.kept)


def total(costs: Iterable[Cost]) -> Cost:
    """One after the other."""
    result = Cost()
    for each in costs:
        result += each
    return result


def elementwise(
    elements: float, width: int, reads: float, writes: float, back: float, kept: float = 0.0, kind: Kind = "pointwise"
) -> Cost:
    """One launch in each pass.

    Args:
        elements: of the largest tensor.
        width: bytes of one.
        reads, writes: how many tensors of this size.
        back: reads and writes of the backward pass; 0: none is needed.
        kept: bytes.
    """
    size = elements * width
    backward = (Kernel(kind, bytes=back * size),) if back else ()
    return Cost((Kernel(kind, bytes=(reads + writes) * size),), backward, kept)


def product(
    rows: float, inner: float, columns: float, width: int, bias: bool = False, keeps_input: bool = True
) -> Cost:
    """[T, I] × [I, O]: a linear layer, with the gradients of its input, weight and bias.

    Args:
        keeps_input: the input is no tensor that something else keeps, too.
    """
    flops, size = 2.0 * rows * inner * columns, width * (rows * inner + inner * columns + rows * columns)
    of_bias = (Kernel("reduction", bytes=width * rows * columns),) if bias else ()
    backward = (
        _matrix(flops, size, rows, columns, inner),
        _matrix(flops, size, inner, rows, columns, tokens=1),
        *of_bias,
    )
    kept = width * rows * inner if keeps_input else 0.0
    return Cost((_matrix(flops, size, rows, inner, columns),), backward, kept)


def _matrix(flops: float, size: float, rows: float, inner: float, columns: float, tokens: Literal[0, 1] = 0) -> Kernel:
    return Kernel("product", flops, size, (round(rows), round(inner), round(columns)), tokens=tokens)


def grouped_product(
    rows: float,
    inner: float,
    columns: float,
    experts: float,
    width: int,
    bias: bool = False,
    keeps_input: bool = True,
    stacked: bool = True,
) -> Cost:
    """One product for all local experts.

    Args:
        rows: of all experts together.
        stacked: each expert has a weight of its own. They are copied into one for the product, which keeps it, and
            their gradients come out of one.
    """
    flops, weights = 2.0 * rows * inner * columns, width * experts * inner * columns
    size = width * (rows * inner + rows * columns) + weights
    shape = (round(rows / experts), round(inner), round(columns))
    turned = (shape[0], shape[2], shape[1]), (shape[1], shape[0], shape[2])
    of_bias = (Kernel("pointwise", bytes=2 * width * rows * columns, launches=round(experts)),) if bias else ()
    sums = (Kernel("reduction", bytes=width * rows * columns, launches=round(experts)),) if bias else ()
    copies = (Kernel("pointwise", bytes=2 * weights),) if stacked else ()
    forward = (*copies, Kernel("grouped product", flops, size, shape), *of_bias)
    backward = tuple(Kernel("grouped product", flops, size, each) for each in turned)
    kept = (width * rows * inner if keeps_input else 0.0) + (weights if stacked else 0.0)
    return Cost(forward, (*sums, *backward, *copies), kept)


def norm(rows: float, hidden: int, width: int, rms: bool, keeps_input: bool = True) -> Cost:
    """LayerNorm or RMSNorm; keeps its input and fp32 statistics. Backward: the input's gradient, then the weight's."""
    size, statistics = rows * hidden * width, rows * _FP32 * (1 if rms else 2)
    backward = (Kernel("reduction", bytes=3 * size), Kernel("reduction", bytes=2 * size))
    return Cost((Kernel("reduction", bytes=2 * size),), backward, (size if keeps_input else 0.0) + statistics)


def residual(rows: float, hidden: int, width: int, dropout: float) -> Cost:
    """Adds a branch to the residual stream, with dropout on it. Backward: the stream's gradients meet in a sum."""
    elements = rows * hidden
    added = elementwise(elements, width, reads=2, writes=1, back=3)
    if not dropout:
        return added
    # The mask is a byte per element.
    return elementwise(elements, width, 1, 1 + 1 / width, back=2 + 1 / width, kept=elements) + added


def all_reduce(size: float, ranks: int, forward: bool) -> Cost:
    """Tensor parallelism's sum behind a row-parallel product, or before a column-parallel one in the backward pass."""
    if ranks == 1:
        return Cost()
    part = (Reduced("all-reduce", "tp", size),)
    return Cost(part) if forward else Cost((), part)


def activation(rows: float, inner: float, width: int, gated: bool, kept: bool = True) -> Cost:
    """GELU, or the SiLU of one half times the other; keeps its input.

    Args:
        inner: width of its output.
    """
    size = rows * inner * width
    reads = 2 if gated else 1
    kind: Kind = "gated activation" if gated else "activation"
    forward = Kernel(kind, bytes=(reads + 1) * size)
    backward = Kernel(kind, bytes=(2 * reads + 1) * size)
    return Cost((forward,), (backward,), reads * size if kept else 0.0)
