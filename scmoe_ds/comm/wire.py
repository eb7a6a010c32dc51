"""Number formats of rows on the wire; the computation on either side keeps its own.

"bf16" halves the bytes of fp32 rows. "fp8" (e4m3) quarters them. Each row then has its own fp32 scale, which maps the
row's largest magnitude to the largest e4m3 number, 448.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIRE_DTYPES = ("bf16", "fp8")
_E4M3_MAX = 448.0
_SCALE_BYTES = 4


def pack(rows: Tensor, wire_dtype: str | None) -> Tensor:
    """[R, D] in any floating dtype → what is sent: the rows, bf16 rows, or uint8 rows of D + 4 bytes."""
    if wire_dtype is None:
        return rows
    if wire_dtype == "bf16":
        return rows.to(torch.bfloat16)
    largest = rows.detach().abs().amax(-1, keepdim=True).float()
    scale = (largest / _E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)  # no 0/0 in rows of (almost) zeros
    quantized = (rows / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.cat([quantized.view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=-1)


def unpack(packed: Tensor, wire_dtype: str | None, dtype: torch.dtype) -> Tensor:
    """What was received → [R, D] rows of `dtype`."""
    if wire_dtype is None:
        return packed
    if wire_dtype == "bf16":
        return packed.to(dtype)
    quantized, scale = packed[:, :-_SCALE_BYTES], packed[:, -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (quantized.view(torch.float8_e4m3fn).float() * scale).to(dtype)
