"""What operators of a GPU keep for the backward pass, which torch decides by a device that is not here."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from scmoe_ds.check.cards import card_of
from scmoe_ds.check.cuda import standing_in
from scmoe_ds.check.fakes import Fakes
from scmoe_ds.check.kernels import of_gpu, without_memory
from scmoe_ds.check.storages import Storages

ROWS, WIDTH = 2048, 512


def test_an_rms_norm_keeps_its_input_and_a_number_per_row() -> None:
    """It is one kernel on a GPU. A torch for CPUs composes it of operators that keep two fp32 tensors more."""
    device = torch.device("cuda", 0)
    fakes, storages = Fakes(device), Storages("cuda")
    with ExitStack() as stack:
        for each in (
            without_memory(),
            standing_in(card_of("A800"), 1, lambda: storages.total, lambda: storages.peak),
            of_gpu(device, (8, 0)),
            fakes,
            fakes.meta,
            storages,
        ):
            stack.enter_context(each)
        norm = nn.RMSNorm(WIDTH, dtype=torch.bfloat16, device=device)
        rows = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
        before = storages.total
        output = norm(rows)
        assert storages.total - before == 2 * ROWS * WIDTH + 4 * ROWS
        output.sum().backward()
        assert rows.grad is not None and rows.grad.shape == rows.shape and norm.weight.grad is not None
