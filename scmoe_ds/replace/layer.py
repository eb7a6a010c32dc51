"""The layer that takes the place of a `deepspeed.moe.layer.MoE`."""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.replace.hooked import HookedPair


class HookedScMoE(ScMoE):
    """A ScMoE in the place of a MoE; a `HookedPair` feeds it from an earlier layer.

    Attributes:
        pair: None: the routed experts read the layer's own input, as DeepSpeed's do.
        replaced: the layer whose place it takes, and its number of experts per token.
        runs_converted: whether the pass that is going on runs as a ScMoE; all of them do.
    """

    runs_converted = True
    pair: HookedPair | None = None
    replaced: tuple[MoE, int]
    shortcut_norm: nn.Module | None  # a default here would hide the module of that name

    def forward(
        self, hidden_states: Tensor, used_token: Tensor | None = None, shortcut: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As DeepSpeed's MoE; the shortcut comes from the pair."""
        if self.pair is None or shortcut is not None:
            return super().forward(hidden_states, used_token, shortcut)
        return self.pair.join(hidden_states, used_token)
