"""What the check has to know of a card: compute capability and memory, from the table of `simulate/cards.py`."""

from __future__ import annotations

from dataclasses import dataclass

from scmoe_ds.errors import ArgumentError
from scmoe_ds.simulate.cards import CARDS, find, gpu_of


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


def card_of(name: str) -> Card:
    """The card of a short name, such as "A800", or of a name in a cluster's JSON, such as "A800-PCIe-80GB".

    Raises:
        ArgumentError: none of the names.
    """
    found = find(name)
    if found is None:
        short = ", ".join(sorted(card.short for card in CARDS if card.short))
        raise ArgumentError(f"--card {name}: must be one of {short}, or a name of scmoe_ds/simulate/cards.py")
    gpu = gpu_of(found)
    return Card(gpu.name, gpu.capability, round(gpu.memory))
