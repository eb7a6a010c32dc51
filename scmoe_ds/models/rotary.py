"""Rotary positions.

Shape suffixes: B batch, S sequence, N heads, H head size, X half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RotaryEmbedding(nn.Module):
    """Rotary position embedding on the two halves of each head (the layout of LLaMA's Hugging Face weights).

    The angles are no buffer: a bf16 engine would round them, and positions beyond 256 would become alike.
    """

    def __init__(self, head_size: int, base: float) -> None:
        super().__init__()
        self.head_size, self.base = head_size, base
        self._table: tuple[Tensor, Tensor] | None = None

    def forward(self, heads_BSNH: Tensor, positions_BS: Tensor | None = None, capacity: int = 0) -> Tensor:
        """
        Args:
            positions_BS: int64 place of each token in its sequence; None: 0, 1, … in all of them.
            capacity: no position reaches it.
        """
        S = heads_BSNH.shape[1]
        places = slice(S) if positions_BS is None else positions_BS
        cosine, sine = (table[places].unsqueeze(-2) for table in self._angles(max(S, capacity), heads_BSNH.device))
        return _Rotate.apply(heads_BSNH, cosine, sine)

    def _angles(self, sequence: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table[0].shape[0] < sequence or self._table[0].device != device:
            exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=device) / self.head_size
            positions = torch.arange(sequence, dtype=torch.float32, device=device)
            angle_SX = torch.outer(positions, self.base**-exponent)
            cosine_SX, sine_SX = angle_SX.cos(), angle_SX.sin()
            self._table = torch.cat([cosine_SX, cosine_SX], dim=1), torch.cat([-sine_SX, sine_SX], dim=1)
        return self._table


class _Rotate(torch.autograd.Function):
    """Turns each pair of a head's halves (a, b) to (a cos - b sin, b cos + a sin), in fp32 up to the result. The
    gradient is turned back. torch's own rounds both summands of it."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return torch.add(heads * cosine, _swap_halves(heads) * sine, out=torch.empty_like(heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,), (cosine, sine) = grads, ctx.saved_tensors
        return torch.sub(grad * cosine, _swap_halves(grad) * sine, out=torch.empty_like(grad)), None, None


def _swap_halves(heads: Tensor) -> Tensor:
    return torch.cat(heads.chunk(2, dim=-1)[::-1], dim=-1)
