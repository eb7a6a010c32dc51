"""Starting weights of what a conversion adds to a Hugging Face model, so that its first forward pass is near the old.

    coefficient of a shared expert of the source    cg1: 0.98 · shared + routed, cg2: half of both (the source's weights
                                                    of 1 and 1 are not among those that add up to 1)
    coefficient of an added shared expert           cg1: 0.02 · shared + routed, cg2: 0.02 · shared + 0.98 · routed
    added shared expert without a coefficient       its down projection is scaled: 0.02 · shared + routed

Weights of 0 and 1 would be nearer, but a sigmoid that is there does not train. The coefficient's weight is zero, so
that all tokens have the same weights at first.

E experts, D hidden, F inner width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scmoe_ds.config.names import Merge
from scmoe_ds.replace.modeling_adapted import SharedExpert, ShortcutParts

SHARE = 0.02
"""Of an added shared expert in the first forward pass."""


def start_coefficient(coefficient: nn.Linear, merge: Merge, shared_is_added: bool) -> None:
    """Sets the first weights of a merge, in place.

    Args:
        coefficient: Linear(D, 1) for cg1, Linear(D, 2) for cg2, of which row 0 weighs the routed experts.
        shared_is_added: whether the conversion has added the shared expert; False: it is the source's.
    """
    certain = math.log((1 - SHARE) / SHARE)
    if merge == "cg1":
        bias = [-certain if shared_is_added else certain]
    else:
        bias = [certain, 0.0] if shared_is_added else [0.0, 0.0]
    with torch.no_grad():
        coefficient.weight.zero_()
        coefficient.bias.copy_(torch.tensor(bias))


def start_shared_expert(shared: SharedExpert, gate_up: Tensor, down: Tensor, share: float = 1.0) -> None:
    """Sets an added shared expert to the weights of one routed expert, or to the mean of several, in place.

    Args:
        gate_up: [2F, D].
        down: [D, F].
        share: by which its output is scaled.
    """
    gate, up = gate_up.chunk(2)
    with torch.no_grad():
        shared.gate_proj.weight.copy_(gate)
        shared.up_proj.weight.copy_(up)
        shared.down_proj.weight.copy_(down * share)


def mean_of(weights: Tensor, added_up: Callable[[Tensor], Tensor] = lambda own: own, of: int | None = None) -> Tensor:
    """The mean over experts in fp32, [E, …] → […].

    Args:
        weights: of all experts, or of a rank's own.
        added_up: sums over ranks.
        of: how many experts the ranks have added up; None: those of `weights`.
    """
    return added_up(weights.sum(0, dtype=torch.float32)) / (len(weights) if of is None else of)


def start_parts(parts: ShortcutParts, merge: Merge, experts: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Sets all parts of a layer but its norm, which is a copy already.

    Args:
        experts: gives gate_up [2F, D] and down [D, F] for an added shared expert.
    """
    if parts.shared_expert is not None:
        start_shared_expert(parts.shared_expert, *experts(), share=SHARE if parts.coefficient is None else 1.0)
    if parts.coefficient is not None:
        start_coefficient(parts.coefficient, merge, parts.shared_expert is not None)
