"""How the merge of a converted layer starts: as near to what the layer computed before as its weights allow.

| before | add | cg1: w of the shared expert | cg2: w of routed and shared expert |
|---|---|---|---|
| no shared expert | shared expert x 0.05 | 0.05 | 0.95, 0.05 |
| add | the same | 0.95 | 0.5, 0.5 |
| cg1 | w is dropped | the same | in the ratio 1 : w, to first order around the bias |
| cg2 | both w are dropped | the same w; the routed output's becomes 1 | the same |

0.05 and 0.95 instead of 0 and 1: the gradient of a sigmoid or softmax would vanish there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.config.names import Merge
from scmoe_ds.moe.merge import OUTPUTS

SHARE = 0.05
"""Weight of a new shared expert at the start."""
FITTED_SHARE = {"add": 1.0, "cg1": 0.5, "cg2": 0.2}
"""The same, of one that is fitted to what the routed experts leave: the larger, the smaller its own weights."""
Coefficient = tuple[Tensor, Tensor]
"""Weight [rows, D] and bias [rows] of a coefficient network."""


def start_of_merge(
    merge: Merge, before: Merge | None, old: Coefficient | None, hidden_size: int, share: float = SHARE
) -> Coefficient | None:
    """Weight and bias of the coefficient network; None for "add", which has none.

    Args:
        merge: of the converted layer.
        before: of the layer that it was; None: it had no shared expert.
        old: its coefficient network; None: it had none.
        hidden_size: D.
        share: weight of a new shared expert.
    """
    rows = OUTPUTS[merge]
    if not rows:
        return None
    if merge == before:
        return old
    weight, bias = torch.zeros(rows, hidden_size), torch.zeros(rows)
    if before is None:  # the routed output's row of cg2 is the first
        logit = math.log(share / (1 - share))
        bias[0] = logit if merge == "cg1" else -logit
    elif before == "add" and merge == "cg1":
        bias[0] = math.log((1 - SHARE) / SHARE)
    elif old is not None:
        before_weight, before_bias = (each.float() for each in old)
        if merge == "cg1":  # softmax of two is the sigmoid of their difference
            return before_weight[1:] - before_weight[:1], before_bias[1:] - before_bias[:1]
        weight[1], bias[1] = (1 - before_bias[0].sigmoid()) * before_weight[0], F.logsigmoid(before_bias[0])
    return weight, bias
