"""What the card can do at most, measured: dense matrix products, and copies within its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.notes import Notes
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import ColdClock

REPEATS = 20
_TICK_MS = 5e-4
"""What an event of CUDA resolves: no time is shorter."""


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of a large bf16 product, bytes/s of a large copy. A copy reads and writes each byte: both count."""

    flops: float
    bytes: float

    def flops_share(self, flops: float, milliseconds: float) -> float:
        """The share of the dense peak."""
        return flops / (1e-3 * max(milliseconds, _TICK_MS)) / self.flops

    def bytes_share(self, moved: float, milliseconds: float) -> float:
        """The share of the copy bandwidth."""
        return moved / (1e-3 * max(milliseconds, _TICK_MS)) / self.bytes


def measure(notes: Notes, setting: Setting, clock: ColdClock) -> Ceilings:
    """Both ceilings. Random numbers, since products of zeros take less power and may run faster."""
    side = setting.size(8192, 64)
    pairs = [[_random(side, side, setting) for _ in range(2)] for _ in range(2)]
    product = clock.spread([lambda a=a, b=b: a @ b for a, b in pairs], REPEATS)
    del pairs
    sources = [_random(setting.size(1 << 14, 64), setting.size(1 << 15, 64), setting) for _ in range(2)]
    target = torch.empty_like(sources[0])
    copy = clock.spread([lambda source=source: target.copy_(source) for source in sources], REPEATS)
    ceilings = Ceilings(2 * side**3 / (1e-3 * product.median), 2 * target.nbytes / (1e-3 * copy.median))
    notes.number("dense bf16 TFLOP/s", ceilings.flops / 1e12)
    notes.number("copy GB/s", ceilings.bytes / 1e9)
    what = {f"bf16 product, {side} × {side} × {side}": product, f"copy of {target.nbytes >> 20} MiB": copy}
    values = [f"{ceilings.flops / 1e12:.0f} TFLOP/s", f"{ceilings.bytes / 1e9:.0f} GB/s, read and written"]
    for (name, spread), value in zip(what.items(), values, strict=True):
        notes.row("Ceilings", measured=name, ms=f"{spread.median:.3f}", rate=value)
    return ceilings


def _random(rows: int, columns: int, setting: Setting) -> torch.Tensor:
    return torch.randn(rows, columns, device=setting.device, dtype=torch.bfloat16)
