"""Weights that stay narrow: the same bits as with widened ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scmoe_ds.offload import widening
from scmoe_ds.offload.slots import expert_slots, slot_dtype
from scmoe_ds.offload.widening import WideningLinear

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64,)])
def test_the_same_bits(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in pieces of 48 outputs, of which the last is not full."""
    monkeypatch.setattr(widening, "WIDENED_BYTES", 4 * 192 * 50)
    narrow = nn.Linear(192, 200, bias, dtype=BF16)
    layer = WideningLinear(narrow, BF16)
    layer.load_state_dict(narrow.state_dict(), assign=True)
    rows = torch.randn(*shape, 192)
    assert torch.equal(layer(rows), narrow.float()(rows))


def test_which_slots_are_narrow() -> None:
    """Those of linear layers on a CPU. Slots share memory, and no two parameters share a page."""
    expert = nn.Sequential(nn.Linear(8, 24, device="meta"), nn.GELU(), nn.Linear(24, 8, device="meta"))
    assert slot_dtype(expert, BF16, FP32, CPU) == BF16
    assert slot_dtype(expert, FP32, BF16, CPU) == slot_dtype(expert, torch.float16, BF16, CPU) == BF16
    assert slot_dtype(expert, BF16, FP32, torch.device("cuda")) == FP32
    assert slot_dtype(nn.Sequential(expert, nn.LayerNorm(8)), BF16, FP32, CPU) == FP32
    slots = expert_slots(expert, 2, BF16, FP32, CPU)
    parameters = [parameter for slot in slots for parameter in slot.parameters()]
    assert len({parameter.data_ptr() // 4096 for parameter in parameters}) == 8
    assert all(parameter.data_ptr() % 4096 == 0 and not parameter.requires_grad for parameter in parameters)
    for number, parameter in enumerate(parameters):
        parameter.fill_(number)
    assert [float(parameter.max()) for parameter in parameters] == list(range(8))
    assert slots[1](torch.ones(3, 8)).dtype == FP32
