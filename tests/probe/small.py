"""Sizes that take no time, for tests."""

from __future__ import annotations

from scmoe_ds.probe.sizes import Attended, Sizes

SMALL = Sizes(
    rows=(4, 16),
    widths=(8, 16),
    experts=((2, 8, 16),),
    attended=(Attended((8, 16), 8, 2, 1, causal=True), Attended((9,), 8, 2, 2, causal=False)),
    numbers=(1 << 8, 1 << 10),
    hidden=32,
    vocabulary=64,
    copied=(1 << 10, 1 << 14),
    sent=(1 << 8, 1 << 12),
    beside=(1 << 12,),
    evicted=1 << 10,
    rounds=(2, 3),
)
