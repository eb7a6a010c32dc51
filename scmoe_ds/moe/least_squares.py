"""The output projection of a shared expert by ridge regression, from sums over tokens.

Shape suffixes: D hidden, F inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3
"""λ, relative to the mean square of an inner activation."""
_LEAST_RIDGE = 1e-30
"""λ where all inner activations are 0, as behind a dead ReLU. No token's activation is as small. W is 0 then."""


def solve(inner_FF: Tensor, missing_FD: Tensor) -> Tensor:
    """[F, D], the W that minimises Σ |missing - W a|² + λ |W|², of Σ a aᵀ and Σ a missingᵀ in fp64."""
    ridge = max(RIDGE * float(inner_FF.diagonal().mean()), _LEAST_RIDGE)
    return torch.linalg.solve(inner_FF + ridge * torch.eye(len(inner_FF)).to(inner_FF), missing_FD)
