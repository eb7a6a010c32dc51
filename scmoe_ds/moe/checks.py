"""What a caller of the stages can get wrong, in one sentence each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_input(name: str, value: Tensor, hidden_size: int) -> None:
    """Raises a ValueError for an input of a layer that is no floating-point tensor [..., D].

    Args:
        name: of the argument.
        value: what was handed over.
        hidden_size: D of the layer.
    """
    if not isinstance(value, Tensor):
        hint = "; take the tensor out of it" if isinstance(value, (tuple, list, dict)) else ""
        raise ValueError(f"{name} is a {type(value).__name__}: must be a tensor [..., {hidden_size}], normalised{hint}")
    if value.ndim == 0 or value.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)}: the last dimension must be {hidden_size}, the layer's hidden_size"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} of dtype {value.dtype}: must be floating point")


def check_dtype(rows: Tensor, experts: nn.Module) -> None:
    """Raises a ValueError for rows of a dtype that no parameter of the experts has, where autocast does not cast them.

    For experts that have failed: some compute in any dtype.
    """
    dtypes = {parameter.dtype for parameter in experts.parameters()}
    if dtypes and rows.dtype not in dtypes and not torch.is_autocast_enabled(rows.device.type):
        has = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"shortcut of dtype {rows.dtype}: the experts have {has}; cast the shortcut, or call the layer under "
            "torch.autocast"
        )
