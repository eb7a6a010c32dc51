"""The table of GPU types."""

from __future__ import annotations

import pytest

from scmoe_ds.check.cards import card_of
from scmoe_ds.simulate.cards import CARDS, GPUS, card_named, find


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_row_is_found_by_all_its_names(card) -> None:  # type: ignore[no-untyped-def]
    assert card_named(card.torch_name) is card
    assert find(card.name.lower()) is card and (not card.short or find(card.short) is card)


def test_names_are_unique() -> None:
    names = [name.upper() for card in CARDS for name in {card.name, card.short} - {""}]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "capability", "gib", "bf16", "bandwidth"),
    [
        # From the data sheets; memory as torch.cuda.get_device_properties gives it, to a GiB.
        ("A30", (8, 0), 24, 165, 933),
        ("A800-SXM4-80GB", (8, 0), 80, 312, 2039),
        ("A800-PCIe-80GB", (8, 0), 80, 312, 1935),
        ("A100-SXM4-40GB", (8, 0), 40, 312, 1555),
        ("H100-SXM5-80GB", (9, 0), 80, 989, 3352),
        ("H800-SXM5-80GB", (9, 0), 80, 989, 3352),
        ("H20-SXM5-96GB", (9, 0), 96, 148, 4000),
        ("H200-SXM", (9, 0), 141, 989, 4800),
        ("L40S", (8, 9), 45, 362, 864),
    ],
)
def test_figures(name: str, capability: tuple[int, int], gib: float, bf16: float, bandwidth: float) -> None:
    gpu = GPUS[name]
    assert gpu.capability == capability and 0.95 * gib < gpu.memory / 2**30 < gib
    assert gpu.peak["bf16"] == pytest.approx(bf16 * 1e12) and gpu.bandwidth == pytest.approx(bandwidth * 1e9)


def test_a_card_without_bf16() -> None:
    assert set(GPUS["V100-SXM2-32GB"].peak) == {"fp16", "fp32"}


def test_the_check_reads_the_same_table() -> None:
    card = card_of("h20")
    assert (card.name, card.capability, card.memory_bytes) == ("NVIDIA H20", (9, 0), GPUS["H20-SXM5-96GB"].memory)
