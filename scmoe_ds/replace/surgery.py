"""Starting weights of what a conversion adds to a Hugging Face model, so that its first forward pass is near the old.

A coefficient starts as `moe.merge_start` says: the families' own shared experts are added with weight 1, a new one has
the weight 0.05. Without a coefficient the new shared expert's down projection is scaled by it.

E experts, D hidden, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scmoe_ds.config.names import Merge
from scmoe_ds.moe.merge_start import SHARE, start_of_merge
from scmoe_ds.replace.modeling_adapted import SharedExpert, ShortcutParts


def mean_of(weights: Tensor, added_up: Callable[[Tensor], Tensor] = lambda own: own, of: int | None = None) -> Tensor:
    """The mean over experts in fp32, [E, …] → […].

    Args:
        weights: of all experts, or of a rank's own.
        added_up: sums over ranks.
        of: how many experts the ranks have added up; None: those of `weights`.
    """
    return added_up(weights.sum(0, dtype=torch.float32)) / (len(weights) if of is None else of)


def start_parts(
    parts: ShortcutParts, merge: Merge, experts: Callable[[], tuple[Tensor, Tensor]], share: float = SHARE
) -> None:
    """Sets all parts of a layer but its norm, which is a copy already, in place.

    Args:
        experts: gives gate_up [2F, D] and down [D, F] for an added shared expert: those of one routed expert, or the
            mean of several.
        share: weight of an added shared expert.
    """
    coefficient, is_added = parts.coefficient, parts.shared_expert is not None
    if parts.shared_expert is not None:
        _start_shared_expert(parts.shared_expert, *experts(), share=share if coefficient is None else 1.0)
    if coefficient is not None:
        start = start_of_merge(merge, None if is_added else "add", None, coefficient.in_features, share)
        assert start is not None
        with torch.no_grad():
            for parameter, value in zip((coefficient.weight, coefficient.bias), start, strict=True):
                parameter.copy_(value)


def _start_shared_expert(shared: SharedExpert, gate_up: Tensor, down: Tensor, share: float) -> None:
    gate, up = gate_up.chunk(2)
    with torch.no_grad():
        shared.gate_proj.weight.copy_(gate)
        shared.up_proj.weight.copy_(up)
        shared.down_proj.weight.copy_(down * share)
