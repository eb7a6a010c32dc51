"""What no cluster is like: figures that contradict each other, and figures beyond any hardware."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import get_args

from scmoe_ds.simulate.cards import card_named
from scmoe_ds.simulate.gpu import Gpu
from scmoe_ds.simulate.interconnect import Between, Curve, Inside
from scmoe_ds.simulate.json_files import nearest
from scmoe_ds.simulate.units import in_words
from scmoe_ds.simulate.work import LIKE, Kind

# Path, unit, least, most, and why no more: about twice what the fastest of 2026 does. Least: far below any in use.
_GPU_BOUNDS = (
    ("memory", "B", 2**30, 1e12, "no GPU has more than 1 TB"),
    ("bandwidth", "B/s", 1e10, 4e13, "no GPU's memory is faster than 40 TB/s"),
)
_CPU_BOUNDS = (
    ("memory", "B", 2**27, 1e14, "no host has more than 100 TB"),
    ("bandwidth", "B/s", 1e8, 1e13, "no host's memory is faster than 10 TB/s"),
)
_PEAK_MOST = {"bf16": 2e16, "fp16": 2e16, "tf32": 1e16, "fp32": 1e15}
_INSIDE = {
    "nvlink switch": (2e10, 4e12, "no NVLink does more than 4 TB/s in one direction"),
    "nvlink mesh": (2e10, 4e12, "no NVLink does more than 4 TB/s in one direction"),
    "pcie": (2.5e8, 2.56e11, "PCIe Gen7 x16 does 256 GB/s in one direction"),
    "loopback": (1e6, 1e12, "no host copies more than 1 TB/s"),
}


def contradictions(nodes: int, gpus_per_node: int, gpu: Gpu, inside: Inside, between: Between | None) -> Iterator[str]:
    """Sentences on fields that do not fit together."""
    if nodes > 1 and between is None:
        yield f'between: is missing; {nodes} nodes need a network, with "nics", "nic_rate", "latency" and "efficiency"'
    if inside.kind == "pcie":
        for name in ("gpus_per_root", "root_rate"):
            if getattr(inside, name) is None:
                yield f'inside.{name}: is missing; GPUs with PCIe share their root complex: see "nvidia-smi topo -m"'
        if inside.gpus_per_root and gpus_per_node % inside.gpus_per_root:
            yield (
                f"inside.gpus_per_root = {inside.gpus_per_root}: must divide gpus_per_node, which is {gpus_per_node}; "
                "take the GPUs below one root complex"
            )
    else:
        for name in ("gpus_per_root", "root_rate", "host_bounce"):
            if getattr(inside, name):
                yield f'inside.{name}: belongs to "kind": "pcie", and kind is "{inside.kind}"; leave it out'
    if inside.kind == "loopback" and gpu.capability != (0, 0):
        yield 'inside.kind = "loopback": is for processes on a CPU; write "nvlink switch", "nvlink mesh" or "pcie"'
    for path, curve in (("inside", inside.efficiency), ("between", between and between.efficiency)):
        if curve and not _rises(curve):
            yield f"{path}.efficiency.points: message sizes must be above 0 and rise; put them in order"


def _rises(curve: Curve) -> bool:
    sizes = [size for size, _ in curve.points]
    return sizes[0] > 0 and all(size < following for size, following in pairwise(sizes))


def beyond_hardware(gpu: Gpu, inside: Inside, between: Between | None) -> Iterator[str]:
    """Sentences on figures that are probably in another unit, or count both directions."""
    yield from _of_gpu(gpu)
    least, most, why = _INSIDE[inside.kind]
    yield from _outside(
        "inside.rate", inside.rate, "B/s", least, most, f"{why}; give the rate of one GPU, one direction"
    )
    yield from _nvlink(gpu, inside)
    yield from _outside("inside.latency", inside.latency, "s", 0, 0.1, "no message inside a node takes 100 ms")
    if inside.root_rate is not None:
        rule = "no root complex does more than 1 TB/s in one direction"
        yield from _outside("inside.root_rate", inside.root_rate, "B/s", 1e6, 1e12, rule)
    if between is not None:
        rule = "no NIC is faster than 1.6 Tbit/s; give the rate of one NIC, and their number in nics"
        yield from _outside("between.nic_rate", 8 * between.nic_rate, "bit/s", 1e6, 1.6e12, rule)
        yield from _outside("between.nics", between.nics, "", 1, 64, "no node has more than 64")
        yield from _outside("between.latency", between.latency, "s", 0, 1, "no message takes more than a second")


def _of_gpu(gpu: Gpu) -> Iterator[str]:
    bounds = _CPU_BOUNDS if gpu.capability == (0, 0) else _GPU_BOUNDS
    for name, unit, least, most, why in bounds:
        yield from _outside(f"gpu.{name}", getattr(gpu, name), unit, least, most, why)
    for precision, peak in gpu.peak.items():
        most = _PEAK_MOST[precision]
        why = f"no GPU does more than {in_words(most, 'FLOP/s')} in {precision}; give the dense peak, without sparsity"
        yield from _outside(f"gpu.peak.{precision}", peak, "FLOP/s", 1e8, most, why)
    if not gpu.peak:
        yield 'gpu.peak: is empty; give a precision and its dense peak, such as "bf16": "312 TFLOP/s"'
    kinds = get_args(Kind)
    for kind in gpu.efficiency.keys() - set(kinds):
        yield f"gpu.efficiency.{kind}: no kind of kernel; {nearest(kind, kinds)}"
    for kind in kinds:
        if not {kind, LIKE.get(kind)} & gpu.efficiency.keys():
            yield f'gpu.efficiency.{kind}: is missing; give its "low", "likely" and "high" share'
    yield from _outside("gpu.launch", gpu.launch, "s", 0, 1e-2, "no launch takes 10 ms")


def _nvlink(gpu: Gpu, inside: Inside) -> Iterator[str]:
    card = card_named(gpu.name)
    if inside.kind.startswith("nvlink") and card is not None and 0 < 1.01 * card.nvlink * 1e9 < inside.rate:
        yield (
            f"inside.rate = {in_words(inside.rate, 'B/s')}: NVLink of {card.name} does {card.nvlink:g} GB/s in one "
            f"direction; data sheets give both directions together"
        )


def _outside(path: str, value: float, unit: str, least: float, most: float, why: str) -> Iterator[str]:
    shown = in_words(value, unit) if unit else f"{value:g}"
    if value > most:
        yield f"{path} = {shown}: {why}"
    elif value < least:
        yield f"{path} = {shown}: is less than {in_words(least, unit)}; is its unit right?"
