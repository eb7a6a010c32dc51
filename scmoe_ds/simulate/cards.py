"""The table of GPU types: what is published of each, and which shares of that its kernels reach.

Peaks are dense: bf16 and fp16 on tensor cores with fp32 accumulation, fp32 without tensor cores, as the vendors' data
sheets give them; where a sheet gives a number with sparsity, it is halved. Memory is what torch sees of it.

Shares by family, where a table or a profile has nothing better:

products    the best that a search over shapes finds is 0.87 of an A100's peak (0.81 with PCIe), 0.80 of an H100's,
            0.78 of a B200's, 0.51 to 0.60 of an MI300X's: "high". "likely" and "low" are estimates for large products
            of other shapes; what small ones lose is in kernels.py. Source of the best: the comparison of "maximum
            achievable matmul FLOPS" in
            https://github.com/stas00/ml-engineering/tree/master/compute/accelerator
attention   FlashAttention-2 reaches 0.50 to 0.73 of an A100's peak (arXiv 2307.08691) and about 0.35 of an H100's,
            FlashAttention-3 up to 0.75 (arXiv 2407.08608); backward passes, short sequences and small heads less.
others      of the memory's bandwidth: a large copy reaches about 0.9 of it; gathers of rows less. Estimates.

`scmoe probe` measures all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from scmoe_ds.simulate.gpu import Efficiency, Gpu, PeakOf

Family = Literal["volta", "turing", "ampere", "ada", "hopper", "h20", "blackwell", "cdna"]
_CAPABILITY: dict[Family, tuple[int, int]] = {
    "volta": (7, 0),
    "turing": (7, 5),
    "ampere": (8, 0),
    "ada": (8, 9),
    "hopper": (9, 0),
    "h20": (9, 0),
    "blackwell": (10, 0),
    "cdna": (9, 4),
}
_PRODUCTS: dict[Family, tuple[float, float, float]] = {
    "volta": (0.55, 0.72, 0.85),
    "turing": (0.35, 0.55, 0.7),
    "ampere": (0.65, 0.78, 0.87),
    "ada": (0.55, 0.75, 0.9),
    "hopper": (0.55, 0.7, 0.8),
    "h20": (0.75, 0.88, 0.95),  # few multiprocessors beside much bandwidth: nothing but computation limits it
    "blackwell": (0.5, 0.66, 0.78),
    "cdna": (0.35, 0.5, 0.6),
}
_ATTENTION: dict[Family, tuple[float, float, float]] = {
    "volta": (0.15, 0.3, 0.5),
    "turing": (0.1, 0.25, 0.4),
    "ampere": (0.35, 0.5, 0.73),
    "ada": (0.35, 0.5, 0.73),
    "hopper": (0.25, 0.38, 0.75),
    "h20": (0.35, 0.55, 0.8),
    "blackwell": (0.2, 0.35, 0.7),
    "cdna": (0.15, 0.3, 0.5),
}
_OF_MEMORY: dict[str, tuple[float, float, float]] = {
    "pointwise": (0.6, 0.8, 0.92),
    "activation": (0.55, 0.75, 0.9),
    "reduction": (0.35, 0.6, 0.85),
    "rows": (0.3, 0.55, 0.8),
}
_GROUPED = 0.9
"""A grouped product reaches this share of what a single one does, beside what its shape costs. Estimate."""
_LAUNCH = 5e-6
"""Seconds of the host for one launch from Python. Estimate; 4 to 10 µs are usual, and `scmoe probe` measures it."""
_COMMUNICATION_SHARE = 0.1
"""Of the multiprocessors. DeepEP takes 12 to 24 of 132 (its README); NCCL's send and receive up to 16 to 32 of 108."""


class Card(NamedTuple):
    """What is published of a GPU type.

    Attributes:
        name: in a cluster's JSON; "NVIDIA " and the like in front of it are left out.
        torch_name: as `torch.cuda.get_device_name` gives it.
        words: of torch's names that mean this type, or one that differs in its memory alone.
        short: behind `scmoe check --card`; "" for those that it does not offer.
        family: of the architecture.
        memory_gib: that torch sees.
        bandwidth: of the memory, GB/s.
        half, single: TFLOP/s.
        multiprocessors: as `torch.cuda.get_device_properties` counts them.
        capability: where it is not the family's.
        nvlink: GB/s in one direction; data sheets give both directions together. 0: none, or a bridge between two.
    """

    name: str
    torch_name: str
    words: str
    short: str
    family: Family
    memory_gib: float
    bandwidth: float
    half: float
    single: float
    multiprocessors: int
    capability: tuple[int, int] | None = None
    nvlink: float = 0


# The order counts: the first row whose words are all in a name is the one.
CARDS: tuple[Card, ...] = (
    Card("GB200", "NVIDIA GB200", "GB200", "", "blackwell", 184.0, 8000, 2500, 80, 152, nvlink=900),
    Card("B200", "NVIDIA B200", "B200", "B200", "blackwell", 178.4, 8000, 2250, 80, 148, nvlink=900),
    Card("GH200-96GB", "NVIDIA GH200 480GB", "GH200", "", "hopper", 94.5, 4000, 989, 67, 132, nvlink=450),
    Card("H200-NVL", "NVIDIA H200 NVL", "H200 NVL", "", "hopper", 139.8, 4800, 835, 60, 132),
    Card("H200-SXM", "NVIDIA H200", "H200", "H200", "hopper", 139.8, 4800, 989, 67, 132, nvlink=450),
    Card("H100-NVL", "NVIDIA H100 NVL", "H100 NVL", "", "hopper", 93.1, 3938, 835, 60, 132),
    Card("H100-PCIe-80GB", "NVIDIA H100 PCIe", "H100 PCIe", "", "hopper", 79.1, 2039, 756, 51, 114),
    Card("H100-SXM5-80GB", "NVIDIA H100 80GB HBM3", "H100", "H100", "hopper", 79.1, 3352, 989, 67, 132, nvlink=450),
    Card("H800-PCIe-80GB", "NVIDIA H800 PCIe", "H800 PCIe", "", "hopper", 79.1, 2039, 756, 51, 114),
    Card("H800-SXM5-80GB", "NVIDIA H800", "H800", "H800", "hopper", 79.1, 3352, 989, 67, 132, nvlink=200),
    Card("H20-SXM5-96GB", "NVIDIA H20", "H20", "H20", "h20", 95.1, 4000, 148, 44, 78, nvlink=450),
    Card(
        "A100-SXM4-80GB",
        "NVIDIA A100-SXM4-80GB",
        "A100 SXM4 80GB",
        "A100",
        "ampere",
        79.3,
        2039,
        312,
        19.5,
        108,
        nvlink=300,
    ),
    Card(
        "A100-SXM4-40GB",
        "NVIDIA A100-SXM4-40GB",
        "A100 SXM4 40GB",
        "A100-40GB",
        "ampere",
        39.4,
        1555,
        312,
        19.5,
        108,
        nvlink=300,
    ),
    Card("A100-PCIe-80GB", "NVIDIA A100 80GB PCIe", "A100 80GB PCIe", "", "ampere", 79.3, 1935, 312, 19.5, 108),
    Card("A100-PCIe-40GB", "NVIDIA A100-PCIE-40GB", "A100", "", "ampere", 39.4, 1555, 312, 19.5, 108),
    Card(
        "A800-SXM4-80GB", "NVIDIA A800-SXM4-80GB", "A800 SXM4", "A800", "ampere", 79.3, 2039, 312, 19.5, 108, nvlink=200
    ),
    Card("A800-PCIe-80GB", "NVIDIA A800 80GB PCIe", "A800", "", "ampere", 79.3, 1935, 312, 19.5, 108),
    Card("A30", "NVIDIA A30", "A30", "A30", "ampere", 23.5, 933, 165, 10.3, 56),
    Card("A40", "NVIDIA A40", "A40", "", "ampere", 44.4, 696, 149.7, 37.4, 84, (8, 6)),
    Card("A10G", "NVIDIA A10G", "A10G", "", "ampere", 22.1, 600, 70, 35, 80, (8, 6)),
    Card("A10", "NVIDIA A10", "A10", "", "ampere", 22.1, 600, 125, 31.2, 72, (8, 6)),
    Card("L40S", "NVIDIA L40S", "L40S", "L40S", "ada", 44.4, 864, 362, 91.6, 142),
    Card("L40", "NVIDIA L40", "L40", "", "ada", 44.4, 864, 181, 90.5, 142),
    Card("L4", "NVIDIA L4", "L4", "", "ada", 22.1, 300, 121, 30.3, 58),
    Card("RTX6000-Ada", "NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "", "ada", 47.4, 960, 364.2, 91.1, 142),
    Card("RTX-A6000", "NVIDIA RTX A6000", "RTX A6000", "", "ampere", 47.4, 768, 154.8, 38.7, 84, (8, 6)),
    Card("RTX-A5000", "NVIDIA RTX A5000", "RTX A5000", "", "ampere", 23.6, 768, 111.1, 27.8, 64, (8, 6)),
    Card("RTX5090", "NVIDIA GeForce RTX 5090", "RTX 5090", "", "ada", 31.4, 1792, 209.5, 104.8, 170, (12, 0)),
    Card("RTX4090", "NVIDIA GeForce RTX 4090", "RTX 4090", "RTX4090", "ada", 23.5, 1008, 165.2, 82.6, 128),
    Card("RTX4080", "NVIDIA GeForce RTX 4080", "RTX 4080", "", "ada", 15.7, 717, 97.5, 48.7, 76),
    Card("RTX3090-Ti", "NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti", "", "ampere", 23.6, 1008, 80, 40, 84, (8, 6)),
    Card("RTX3090", "NVIDIA GeForce RTX 3090", "RTX 3090", "", "ampere", 23.6, 936, 71, 35.6, 82, (8, 6)),
    Card("RTX3080-Ti", "NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti", "", "ampere", 11.8, 912, 68.2, 34.1, 80, (8, 6)),
    Card("RTX3080", "NVIDIA GeForce RTX 3080", "RTX 3080", "", "ampere", 9.8, 760, 59.5, 29.8, 68, (8, 6)),
    Card("V100S-PCIe-32GB", "Tesla V100S-PCIE-32GB", "V100S", "", "volta", 31.7, 1134, 130, 16.4, 80),
    Card("V100-PCIe-32GB", "Tesla V100-PCIE-32GB", "V100 PCIE", "", "volta", 31.7, 900, 112, 14, 80),
    Card("V100-SXM2-32GB", "Tesla V100-SXM2-32GB", "V100", "V100", "volta", 31.7, 900, 125, 15.7, 80, nvlink=150),
    Card("T4", "Tesla T4", "T4", "", "turing", 14.6, 320, 65, 8.1, 40),
    Card("MI300X", "AMD Instinct MI300X", "MI300X", "", "cdna", 191.5, 5300, 1307.4, 163.4, 304),
    # A device of torch is one of the card's two dies.
    Card("MI250X", "AMD Instinct MI250X", "MI250X", "", "cdna", 64.0, 1638, 191.5, 23.9, 104, (9, 0)),
)
_OTHER_CARDS = {"LAPTOP", "MAX", "MIG", "SUPER", "TI", "D"}
"""Words with which a name means another card, or a part of one, unless the table's name has them too."""


def card_named(torch_name: str) -> Card | None:
    """The row of a card as torch names it, such as "NVIDIA A100-SXM4-80GB"; None if it is not in the table."""
    words = set(torch_name.upper().replace("-", " ").split())
    for card in CARDS:
        named = set(card.words.upper().split())
        if named <= words and not (words - named) & _OTHER_CARDS:
            return card
    return None


def find(name: str) -> Card | None:
    """The row of a name that a user wrote: that of a cluster's JSON, or the short one, in any case of the letters."""
    return next((card for card in CARDS if name.upper() in (card.name.upper(), card.short.upper() or None)), None)


def peaks_of(card: Card) -> dict[PeakOf, float]:
    """TFLOP/s by precision. Before Ampere there is neither bf16 nor TF32; TF32 products take twice as long as bf16."""
    if card.family in ("volta", "turing"):
        return {"fp16": card.half, "fp32": card.single}
    return {"bf16": card.half, "fp16": card.half, "tf32": card.half / 2, "fp32": card.single}


def gpu_of(card: Card) -> Gpu:
    """A card as a cluster has it."""
    products = _PRODUCTS[card.family]
    return Gpu(
        name=card.torch_name,
        peak={precision: tflops * 1e12 for precision, tflops in peaks_of(card).items()},
        memory=round(card.memory_gib * 2**30) + 0.0,
        bandwidth=card.bandwidth * 1e9,
        launch=_LAUNCH,
        communication_share=_COMMUNICATION_SHARE,
        efficiency={
            "product": _efficiency(products),
            "grouped product": _efficiency([_GROUPED * share for share in products]),
            "attention": _efficiency(_ATTENTION[card.family]),
            **{kind: _efficiency(shares) for kind, shares in _OF_MEMORY.items()},
        },
        capability=card.capability or _CAPABILITY[card.family],
        multiprocessors=card.multiprocessors,
    )


def _efficiency(shares: Sequence[float]) -> Efficiency:
    low, likely, high = shares
    return Efficiency(low=low, likely=likely, high=high)


GPUS: dict[str, Gpu] = {card.name: gpu_of(card) for card in CARDS}
"""By the name in a cluster's JSON."""
NAMES = tuple(dict.fromkeys(name for card in CARDS for name in (card.name, card.short) if name))
"""All that a user may write, the short ones of `scmoe check` among them."""
