"""Work of the computation to milliseconds: a roofline with the shares of peaks that kernels really reach.

A product takes flops / (peak · share) or bytes / (bandwidth · share), whichever is longer, and no less than its
launches. The share is the one of its kind, times what its shape leaves of it: the output is computed in tiles, as many
at a time as there are multiprocessors, and the last wave of them is not full (NVIDIA, Matrix Multiplication Background
User's Guide). Measured shapes correct that: their ratios of measured to expected share, weighted by nearness in the
logarithms of the shape. At a measured shape the measured share counts; far from all of them, the expected one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from scmoe_ds.errors import ClusterError
from scmoe_ds.simulate.gpu import Gpu, Measured
from scmoe_ds.simulate.layout import Precision
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.work import Kernel

Bound = Literal["compute", "memory", "launch"]
Phase = Literal["forward", "backward"]
Shape = tuple[int, int, int]
Expected = Callable[[Shape], float]

_PRODUCTS = ("product", "grouped product")
_LIKE = {"grouped product": "product", "activation": "pointwise", "reduction": "pointwise", "rows": "pointwise"}
"""Whose efficiency a kind takes that a GPU's description has none of."""
_USUAL = {"product": 0.75, "attention": 0.5, "pointwise": 0.8}
_TILES = ((256, 128, 1.0), (128, 128, 0.96), (128, 64, 0.89), (64, 64, 0.83))
"""Rows and columns of a tile, and the share of the largest one's speed: smaller ones read more per operation. A tile of
a · b outputs does a·b / (a + b) operations per value read, n; the speeds are n / (n + 12), over that of the first."""
_INNER = 64
"""Inner numbers that cost as much as filling the pipeline of a tile."""
_START = 2e-6
"""Seconds from the end of a kernel to the full speed of the next on a GPU. Estimate; measured shapes contain it."""
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
    gpu = machine.cluster.gpu
    launch = kernel.launches * gpu.launch
    seconds, bound = _seconds(kernel, gpu, precision, phase)
    if gpu.multiprocessors:
        seconds += kernel.launches * _START
    return 1e3 * max(seconds, launch), bound if seconds >= launch else "launch"


def _seconds(kernel: Kernel, gpu: Gpu, precision: Precision, phase: Phase) -> tuple[float, Bound]:
    if kernel.kind in _PRODUCTS and kernel.shape is not None:
        return _product_seconds(kernel, gpu, precision, phase)
    table = _table(gpu, kernel.kind, precision, phase)
    if kernel.kind in (*_PRODUCTS, "attention"):
        share = _efficiency(gpu, kernel.kind)
        if kernel.shape is not None:
            share *= _correction(kernel.shape, table, lambda _: _efficiency(gpu, kernel.kind))
        compute = kernel.flops / (_peak(gpu, precision) * share)
        memory = 0.0 if table else kernel.bytes / (gpu.bandwidth * _efficiency(gpu, "pointwise"))
        return max(memory, compute), "compute" if compute >= memory else "memory"
    of_one = (max(1, round(kernel.bytes / kernel.launches)), 1, 1)
    share = _efficiency(gpu, kernel.kind) * _correction(of_one, table, lambda _: _efficiency(gpu, kernel.kind))
    return kernel.bytes / (gpu.bandwidth * share), "memory"


def _product_seconds(kernel: Kernel, gpu: Gpu, precision: Precision, phase: Phase) -> tuple[float, Bound]:
    assert kernel.shape is not None
    rows, inner, columns = kernel.shape
    peak, shape = _peak(gpu, precision), (max(1, rows), max(1, inner), max(1, columns))
    at_once = max(1.0, kernel.flops / (2 * math.prod(shape) * kernel.launches))

    def expected(shape: Shape) -> float:
        return min(_share_of_tiles(kernel.kind, shape, at_once, gpu), _share_of_memory(shape, gpu, peak, precision))

    share = expected(shape) * _correction(shape, _table(gpu, kernel.kind, precision, phase), expected)
    bound: Bound = "memory" if expected(shape) == _share_of_memory(shape, gpu, peak, precision) else "compute"
    return kernel.flops / (peak * share), bound


def _peak(gpu: Gpu, precision: Precision) -> float:
    peak = gpu.peak.get(precision)
    if peak is None:
        known = ", ".join(sorted(gpu.peak))
        raise ClusterError(
            f"gpu.peak = {known}: {gpu.name} has no {precision} products; train in one of these, or add its peak"
        )
    return peak


def _efficiency(gpu: Gpu, kind: str) -> float:
    for name in (kind, _LIKE.get(kind, kind)):
        if name in gpu.efficiency:
            return gpu.efficiency[name].likely
    return _USUAL[_LIKE.get(kind, kind)]


def _share_of_memory(shape: Shape, gpu: Gpu, peak: float, precision: Precision) -> float:
    """Of the peak, that a product gets while its matrices are read and written once."""
    rows, inner, columns = shape
    numbers = rows * inner + inner * columns + rows * columns
    per_second = gpu.bandwidth * _efficiency(gpu, "pointwise") / (numbers * bytes_per_number(precision))
    return 2 * math.prod(shape) * per_second / peak


def _share_of_tiles(kind: str, shape: Shape, at_once: float, gpu: Gpu) -> float:
    """Of the peak, by the kind and what tiles and waves leave of it.

    Args:
        at_once: products of this shape in a launch.
    """
    share, (rows, inner, columns) = _efficiency(gpu, kind), shape
    if not gpu.multiprocessors:
        return share
    best = 0.0
    for tall, wide, speed in _TILES:
        tiles = at_once * math.ceil(rows / tall) * math.ceil(columns / wide)
        # Where few tiles are left to do, a library splits the inner numbers of each among several multiprocessors.
        pieces = max(1, min(math.floor(gpu.multiprocessors / tiles), inner // (8 * _INNER)))
        waves = math.ceil(tiles * pieces / gpu.multiprocessors) / pieces
        best = max(best, speed * at_once * rows * columns / (waves * gpu.multiprocessors * tall * wide))
    return share * best * inner / (inner + _INNER)


def _table(gpu: Gpu, kind: str, precision: Precision, phase: Phase) -> list[Measured]:
    """What was measured of a kind. Of bf16 and fp16 one counts for the other."""
    alike = ("fp32",) if precision == "fp32" else ("bf16", "fp16")
    return [
        each
        for each in gpu.table
        if each.kind == kind and each.phase in (None, phase) and (each.precision is None or each.precision in alike)
    ]


def _correction(shape: Shape, table: list[Measured], expected: Expected) -> float:
    """By what measured shares near a shape differ from the expected ones."""
    total, weights = 0.0, _FAR**-4
    for each in table:
        octaves2 = sum(math.log2(own / other) ** 2 for own, other in zip(shape, each.shape, strict=True))
        difference = math.log(each.share / expected(each.shape))
        if octaves2 < 1e-12:
            return math.exp(difference)
        # The fourth power lets the nearest shapes count, however many others were measured.
        total, weights = total + difference * octaves2**-2, weights + octaves2**-2
    return math.exp(total / weights)
