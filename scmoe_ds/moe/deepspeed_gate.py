"""DeepSpeed's own MoE layer for masked tokens with every k, for any number of tokens, and with `gate_softmax`.

The baselines "topk" and "shared_expert" are DeepSpeed's layers. DeepSpeed's gate refuses fewer tokens than
`min_capacity` with k = 1, and takes no mask with k > 1. The rest of the layer has no such limits. So only the gate is
replaced. The new gate runs DeepSpeed's own code where it can, and takes any router (scmoe_ds.moe.router).
"""

from __future__ import annotations

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor

from scmoe_ds.config.names import GateSoftmax
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.moe.capacity import capacity_of
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.placement import mpu_tensor_parallel_size
from scmoe_ds.moe.router import RouterGate, equip

Gated = tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]
"""Loss, capacity, number of experts, expert, location and weight [K, T], tokens per expert; as DeepSpeed's gate."""


class AnyTokensGate(RouterGate):
    """
    Attributes:
        softmax: see scmoe_ds.moe.gate.
        unequal: expert-parallel ranks may have different numbers of tokens. They then agree on the size of the buffers
            by an all-reduce in every pass. Otherwise the number of tokens gives the size, as in DeepSpeed.
    """

    softmax: GateSoftmax = "deepspeed"
    unequal: bool = False

    def forward(
        self, input: Tensor, used_token: Tensor | None = None, sparse_routes: bool = False, use_tutel: bool = False
    ) -> Gated:
        """See `TopKGate.forward`; `used_token` as in `scmoe_ds.moe.gate.route`."""
        few = len(input) < max(self.min_capacity, 1)
        other = self.softmax != "deepspeed" or self.router != RouterConfig()
        ours = used_token is not None or few or self.unequal or other
        if not ours or not sparse_routes or use_tutel:
            return super().forward(input, used_token, sparse_routes, use_tutel)
        by_shape = self.drop_tokens and not self.unequal
        routing = route(self, input, used_token, None, self.softmax, None if by_shape else self.ep_group)
        # Without a mask other ranks run DeepSpeed's code: the same number of tokens must give the same buffers.
        rows = capacity_of(self, len(input)) if by_shape else int(routing.capacity)
        ranks = mpu_tensor_parallel_size()  # among which DeepSpeed divides a buffer
        capacity = torch.tensor(-(-max(rows, 1) // ranks) * ranks)
        return (
            routing.l_aux,
            capacity,
            self.wg.out_features,
            routing.expert_KT.int(),
            routing.location_KT.int(),
            routing.weight_KT,
            routing.exp_counts,
        )


def admit_any_tokens(moe: MoE, softmax: GateSoftmax, unequal: bool = False, router: RouterConfig | None = None) -> MoE:
    """Replaces the gate of one of DeepSpeed's own layers. Parameters and settings of the gate stay."""
    gate = moe.deepspeed_moe.gate
    gate.__class__ = AnyTokensGate
    gate.softmax, gate.unequal = softmax, unequal
    equip(gate, router or RouterConfig())
    return moe
