"""Which sizes are measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attended:
    """An attention.

    Attributes:
        spans: tokens that a token attends to, rising.
        head: size of one.
        heads: of one sequence or window.
        sequences: or windows.
        causal: half of the scores are masked; False: a bias is added to all of them, as in a window.
    """

    spans: tuple[int, ...]
    head: int
    heads: int
    sequences: int
    causal: bool


@dataclass(frozen=True)
class Sizes:
    """A grid of everything. What takes too long on a machine, or does not fit, is left out there.

    Attributes:
        rows: of products, rising; of each local expert all but the last.
        widths: inner numbers and columns of products.
        experts: local ones, width of a token's row, width inside an expert.
        attended: attentions.
        numbers: of the tensors that pass through memory, rising.
        hidden, vocabulary: width of their rows; of a loss.
        copied: bytes, rising.
        sent: bytes of collectives, rising.
        beside: bytes of an all-to-all that products run beside, rising.
        evicted: bytes that are written between two trials; None: more than the device's caches hold.
        rounds: fewest and most.
    """

    rows: tuple[int, ...] = (16, 128, 1024, 8192)
    widths: tuple[int, ...] = (128, 512, 2048, 8192)
    experts: tuple[tuple[int, int, int], ...] = ((4, 512, 2048), (8, 1024, 4096), (16, 2048, 1024))
    attended: tuple[Attended, ...] = (
        Attended((64, 256, 1024, 4096), 64, 16, 1, causal=True),
        Attended((64, 256, 1024), 64, 8, 8, causal=True),
        Attended((256, 1024, 4096), 128, 16, 1, causal=True),
        Attended((49, 144, 256), 32, 12, 4, causal=False),
        Attended((49, 144, 256), 32, 12, 64, causal=False),
    )
    numbers: tuple[int, ...] = (1 << 16, 1 << 19, 1 << 22, 1 << 24)
    hidden: int = 1024
    vocabulary: int = 1 << 15
    copied: tuple[int, ...] = (1 << 25, 1 << 28)
    sent: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)
    beside: tuple[int, ...] = (1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
    evicted: int | None = None
    rounds: tuple[int, int] = (5, 40)


ALL = Sizes()
