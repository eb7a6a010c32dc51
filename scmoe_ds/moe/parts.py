"""A layer's output in two parts, for a late join: the one that is known, and the one that is still on its way.

The sum of both is what the layer's `finish` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """What `finish_in_parts` of a layer returns.

    Attributes:
        known: [..., D] the weighted output of the shared expert; None: the layer has none.
        late: waits for the combine; returns the weighted output of the routed experts, [..., D], once.
        l_aux, exp_counts: as of `finish`.
    """

    known: Tensor | None
    late: Callable[[], Tensor]
    l_aux: Tensor
    exp_counts: Tensor
