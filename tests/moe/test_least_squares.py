"""Ridge regression from sums over tokens."""

from __future__ import annotations

import torch

from scmoe_ds.moe.least_squares import solve


def test_inner_activations_that_are_all_zero_get_no_weight() -> None:
    """A dead ReLU leaves nothing to fit, which is no error."""
    assert torch.equal(solve(torch.zeros(3, 3).double(), torch.zeros(3, 2).double()), torch.zeros(3, 2).double())
