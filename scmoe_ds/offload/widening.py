"""Linear layers whose weights stay in a narrower dtype than what is computed: bf16 in memory, fp32 in the product.

An expert that arrives in bf16 and is needed in fp32 would be written to memory in fp32 and read again for the product:
three times what arrived, beside a computation that waits for the memory already. Widened here, piece by piece in a
buffer that stays in the cache, it is read once. With few rows that takes no longer than fp32 weights take.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDENED_BYTES = 2 << 20
"""Of the buffer: large enough for the product's full rate, small enough for a cache."""


class WideningLinear(nn.Linear):
    """A linear layer for inference that computes in the dtype of its input: the same bits as with widened weights.

    Args:
        like: has the sizes. The new layer has no memory yet (it is on the meta device).
        dtype: of the parameters.
    """

    def __init__(self, like: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta", dtype=dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """[..., in] → [..., out]. In pieces for one row alone: the sums of more rows depend on the size of a product,
        and there the products take most of the time."""
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        at_once = max(16, WIDENED_BYTES // (rows.dtype.itemsize * self.in_features) // 16 * 16)
        if rows.numel() > self.in_features or at_once >= self.out_features:
            return F.linear(rows, self.weight.to(rows.dtype), bias)
        widened = torch.empty(at_once, self.in_features, dtype=rows.dtype, device=rows.device)
        outputs = []
        for first in range(0, self.out_features, at_once):
            narrow = self.weight[first : first + at_once]
            piece = widened[: narrow.shape[0]].copy_(narrow)
            outputs.append(F.linear(rows, piece, None if bias is None else bias[first : first + at_once]))
        return torch.cat(outputs, -1)
