"""The results of a token's experts, weighted and added up.

Shape suffixes: T tokens, D hidden, K top-k, R rows sent.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def decode(rows_RD: Tensor, row_of_choice_KT: Tensor, weight_KT: Tensor) -> Tensor:
    """Gathers each token's expert outputs and adds them up, weighted, in fp32 (paper eq. 1).

    Args:
        rows_RD: expert outputs, in the order in which the tokens were sent.
        row_of_choice_KT: int64 row of each choice; R for a dropped one.
        weight_KT: fp32 gate values.

    Returns:
        [T, D] in the dtype of `rows_RD`; zeros for a token whose choices were all dropped.
    """
    if rows_RD.shape[0] == 0:
        # No choice was kept. The result depends on the rows all the same: the other ranks wait for their gradient.
        return rows_RD.new_zeros(weight_KT.shape[1], rows_RD.shape[1]) + rows_RD.sum()
    # A dropped choice has weight 0 and may name any row. A zero row for it would need a copy of all rows.
    row_KT = row_of_choice_KT.clamp(max=rows_RD.shape[0] - 1)
    parts = [
        rows_RD.index_select(0, row_T) * weight_T.unsqueeze(1)
        for row_T, weight_T in zip(row_KT, weight_KT, strict=True)
    ]
    return functools.reduce(torch.add, parts).to(rows_RD.dtype)  # fp32 up to here: the weights are
