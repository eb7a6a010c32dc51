"""What the check has to know of a card: compute capability and memory. Peaks stand in training/utilization.py."""

from __future__ import annotations

from dataclasses import dataclass

from scmoe_ds.errors import ArgumentError

_CARDS: dict[str, tuple[str, tuple[int, int], float]] = {
    "A800": ("NVIDIA A800-SXM4-80GB", (8, 0), 79.3),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 79.3),
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", (8, 0), 39.4),
    "A30": ("NVIDIA A30", (8, 0), 23.5),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 79.1),
    "H800": ("NVIDIA H800", (9, 0), 79.1),
    "H200": ("NVIDIA H200", (9, 0), 139.8),
    "L40S": ("NVIDIA L40S", (8, 9), 44.4),
    "RTX4090": ("NVIDIA GeForce RTX 4090", (8, 9), 23.5),
    "V100": ("Tesla V100-SXM2-32GB", (7, 0), 31.7),
}
"""Name of torch, compute capability, GiB that torch sees."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


def card_of(name: str) -> Card:
    """The card of a short name.

    Raises:
        ArgumentError: none of the names.
    """
    found = _CARDS.get(name.upper())
    if found is None:
        raise ArgumentError(f"--card {name}: must be one of {', '.join(_CARDS)}")
    return Card(found[0], found[1], round(found[2] * 2**30))
