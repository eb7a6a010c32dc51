"""Work of the computation to milliseconds: a roofline with the shares of peaks that kernels really reach.

A product takes flops / (peak · share) or bytes / (bandwidth · share), whichever is longer, and no less than its
launches. The share is the one of its kind, times what its shape leaves of it: the output is computed in tiles, as many
at a time as there are multiprocessors, and the last wave of them is not full (NVIDIA, Matrix Multiplication Background
User's Guide). Measured shapes correct that: their ratios of measured to expected share, weighted by nearness in the
logarithms of the shape. At a measured shape the measured share counts; far from all of them, the expected one.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.case import Machine
from scmoe_ds.simulate.gpu import Gpu, Measured
from scmoe_ds.simulate.layout import Precision
from scmoe_ds.simulate.work import LIKE, Kernel, Kind

Bound = Literal["compute", "memory", "launch"]
Phase = Literal["forward", "backward"]
Shape = tuple[int, int, int]

_PRODUCTS = ("product", "grouped product")
_USUAL = {"product": 0.75, "attention": 0.5, "pointwise": 0.8}
_TILES = ((256, 128, 1.0), (128, 128, 0.96), (128, 64, 0.89), (64, 64, 0.83))
"""Rows and columns of a tile, and the share of the largest one's speed: smaller ones read more per operation. A tile of
a · b outputs does a·b / (a + b) operations per value read, n; the speeds are n / (n + 12), over that of the first."""
_PIECES = (1, 2, 4, 8, 16, 32)
"""Where few tiles are left to do, a library splits the inner numbers of each among several multiprocessors."""
_FILL, _SPLIT = 64, 256
"""Inner numbers that cost as much as filling the pipeline of a tile, and as adding up pieces as well. Estimates."""
_START = 2e-6
"""Seconds from the end of a kernel to the full speed of the next on a GPU. Estimate."""
_FAR = 8.0
"""Octaves at which a measured shape counts as much as the expectation."""


def bytes_per_number(precision: Precision) -> int:
    """Of weights in use, activations and what travels."""
    return 4 if precision == "fp32" else 2


def kernel_ms(kernel: Kernel, machine: Machine, precision: Precision, phase: Phase = "forward") -> tuple[float, Bound]:
    """Time of all launches of a kernel, and what bounds it.

    Raises:
        ClusterError: the GPU has no such products.
    """
    return Kernels(machine.cluster.gpu, precision).ms(kernel, phase)


class Kernels:
    """Times of kernels on a GPU in one precision. Remembers them: the chunks of a pair's operators are much alike."""

    def __init__(self, gpu: Gpu, precision: Precision) -> None:
        self._gpu, self._precision = gpu, precision
        self._known: dict[tuple[Kernel, Phase], tuple[float, Bound]] = {}
        self._ratios: dict[tuple[str, Phase, float], list[tuple[list[float], float]]] = {}
        self._efficiency = {kind: efficiency(gpu, kind) for kind in get_args(Kind)}

    def ms(self, kernel: Kernel, phase: Phase) -> tuple[float, Bound]:
        """As `kernel_ms`."""
        key = kernel, phase
        if key not in self._known:
            seconds, bound = self._seconds(kernel, phase)
            launch = self._gpu.launch
            ms = 1e3 * kernel.launches * max(seconds, launch)
            self._known[key] = ms, bound if seconds >= launch else "launch"
        return self._known[key]

    def _seconds(self, kernel: Kernel, phase: Phase) -> tuple[float, Bound]:
        """Of one launch."""
        flops, size = kernel.flops / kernel.launches, kernel.bytes / kernel.launches
        if kernel.kind not in (*_PRODUCTS, "attention"):
            shape: Shape = max(1, round(size)), 1, 1
            return size / shape[0] * self._expected(kernel.kind, shape, 1.0)[0] * self._ratio(
                kernel.kind, shape, 1.0, phase
            ), "memory"
        if kernel.shape is None:
            compute, memory = flops / (self._peak() * self._efficiency[kernel.kind]), self._memory(size)
            return max(compute, memory), "compute" if compute >= memory else "memory"
        rows, inner, columns = kernel.shape
        shape = max(1, rows), max(1, inner), max(1, columns)
        amount = max(1.0, flops / (2 * math.prod(shape))) if kernel.kind in _PRODUCTS else flops
        seconds, bound = self._expected(kernel.kind, shape, amount)
        return seconds * self._ratio(kernel.kind, shape, amount, phase), bound

    def _expected(self, kind: str, shape: Shape, amount: float) -> tuple[float, Bound]:
        """Seconds of a launch without a measurement.

        Args:
            amount: of a product, how many of this shape are in it; of an attention, its operations.
        """
        start = _START if self._gpu.multiprocessors else 0.0
        if kind == "attention":
            return amount / (self._peak() * self._efficiency[kind]) + start, "compute"
        if kind not in _PRODUCTS:
            return shape[0] / (self._gpu.bandwidth * self._efficiency[kind]) + start, "memory"
        rows, inner, columns = shape
        share = self._efficiency[kind] * _share_of_tiles(shape, amount, self._gpu.multiprocessors)
        compute = 2 * amount * math.prod(shape) / (self._peak() * share)
        numbers = rows * inner + inner * columns + rows * columns
        memory = self._memory(amount * numbers * bytes_per_number(self._precision))
        return max(compute, memory) + start, "compute" if compute >= memory else "memory"

    def _memory(self, size: float) -> float:
        return size / (self._gpu.bandwidth * self._efficiency["pointwise"])

    def _ratio(self, kind: str, shape: Shape, amount: float, phase: Phase) -> float:
        """Of measured to expected times near a shape."""
        key = kind, phase, amount
        if key not in self._ratios:
            self._ratios[key] = [
                (list(map(math.log2, each.shape)), math.log(self._measured(each, amount)))
                for each in self._table(kind, phase)
            ]
        own, total, weights = list(map(math.log2, shape)), 0.0, _FAR**-4
        for other, ratio in self._ratios[key]:
            octaves = math.dist(own, other)
            if octaves < 1e-6:
                return math.exp(ratio)
            # The fourth power lets the nearest shapes count, however many others were measured.
            total, weights = total + ratio * octaves**-4, weights + octaves**-4
        return math.exp(total / weights)

    def _measured(self, measured: Measured, amount: float) -> float:
        """Over the expected time."""
        if measured.kind in _PRODUCTS:
            ideal = 2 * amount * math.prod(measured.shape) / self._peak()
        else:
            ideal = amount / self._peak() if measured.kind == "attention" else measured.shape[0] / self._gpu.bandwidth
        return ideal / measured.share / self._expected(measured.kind, measured.shape, amount)[0]

    def _table(self, kind: str, phase: Phase) -> list[Measured]:
        """What was measured of a kind. Of bf16 and fp16 one counts for the other."""
        alike = (None, "fp32") if self._precision == "fp32" else (None, "bf16", "fp16")
        return [
            each
            for each in self._gpu.table
            if each.kind == kind and each.phase in (None, phase) and each.precision in alike
        ]

    def _peak(self) -> float:
        peak = self._gpu.peak.get(self._precision)
        if peak is None:
            known = ", ".join(sorted(self._gpu.peak))
            raise ClusterError(
                f"gpu.peak = {known}: {self._gpu.name} has no {self._precision} products; train in one of these, or "
                f"add its peak"
            )
        return peak


def efficiency(gpu: Gpu, kind: str) -> float:
    """Of a kind of kernel, or of one like it; what is usual where the GPU's description has none."""
    if kind in gpu.efficiency:
        return gpu.efficiency[kind].likely
    return efficiency(gpu, LIKE[kind]) if kind in LIKE else _USUAL[kind]


def _share_of_tiles(shape: Shape, amount: float, multiprocessors: int) -> float:
    """What tiles and waves leave of a product's speed.

    Args:
        amount: products of this shape in a launch.
    """
    if not multiprocessors:
        return 1.0
    (rows, inner, columns), best = shape, 0.0
    for tall, wide, speed in _TILES:
        tiles = amount * math.ceil(rows / tall) * math.ceil(columns / wide)
        for pieces in _PIECES:
            waves = math.ceil(tiles * pieces / multiprocessors)
            cost = waves * multiprocessors * tall * wide * (inner / pieces + (_FILL if pieces == 1 else _SPLIT))
            best = max(best, speed * amount * rows * columns * inner / cost)
    return best
