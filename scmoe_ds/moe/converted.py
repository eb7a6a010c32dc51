"""A ScMoE that can run as its base, too: as the layer ran in the model that it was converted from."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scmoe_ds.config.adapt_section import BaseConfig
from scmoe_ds.config.names import Merge
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.merge import coefficient_network
from scmoe_ds.moe.parts import Parts
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.shortcut import ScMoE


class ConvertedMoE(ScMoE):
    """Both ways use the same gate, experts and, if the base has one, shared expert. They may differ in top-k and merge.
    What the ScMoE has more is not read by the base.

    Args:
        args, kwargs: as for `ScMoE`.
        base: how the layer ran before.

    Attributes:
        as_base: how passes that begin from now on run; see `run_as_base`.
        base_coefficient: the base's network of a merge that is not the ScMoE's; None: there is none, or it is
            `coefficient`.
    """

    def __init__(self, *args: Any, base: BaseConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_sizes(self.num_experts, self.ep_size, base.top_k)
        self.base, self.as_base, self._top_k = base, False, self.top_k
        kept = base.keeps_coefficient(self.merge)
        self.base_coefficient = coefficient_network(base.merge, self.hidden_size) if kept else None

    def run_as_base(self, as_base: bool) -> None:
        """Whether passes that begin from now on run as in the source (True) or as a ScMoE."""
        self.as_base = as_base
        self.deepspeed_moe.gate.k = self.base.top_k if as_base else self._top_k

    def merging(self) -> tuple[Merge, nn.Linear | None]:
        """The merge of passes that begin now, and its coefficient network."""
        if not self.as_base or self.base.merge == self.merge:
            return super().merging()
        return self.base.merge, self.base_coefficient

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `ScMoE.finish`; a base without a shared expert returns the routed output."""
        kind = StagedMoE if self._routed_alone else ScMoE
        return kind.finish(self, routed, hidden_states, shared)

    def finish_in_parts(self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None) -> Parts:
        """As `finish`, without waiting for the combine."""
        kind = StagedMoE if self._routed_alone else ScMoE
        return kind.finish_in_parts(self, routed, hidden_states, shared)

    @property
    def _routed_alone(self) -> bool:
        return self.as_base and self.base.architecture == "pipelined_topk"
