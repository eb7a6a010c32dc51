"""An AutoEP layer as a ScMoE runs it: the layer's own router and experts, and what the conversion has added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.comm.transport import Transport
from scmoe_ds.config.names import Merge
from scmoe_ds.moe.merge import merge_weights, weighted
from scmoe_ds.moe.parts import Parts
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.replace.modeling_adapted import ShortcutParts


class ConvertedLayer:
    """A `moe.stages.StagedLayer` that has no parameters of its own. The layer may run without it, too.

    Args:
        layer: a `replace.autoep.ScheduledAutoEP`.
        parts: of its decoder layer; None: the conversion has added nothing.
        merge: of shared and routed outputs.
        top_k: routed experts per token.
    """

    dispatch = "exact"

    def __init__(self, layer: Any, parts: ShortcutParts | None, merge: Merge, top_k: int) -> None:
        self.layer, self.merge, self.top_k = layer, merge, top_k
        self._added = None if parts is None else parts.shared_expert
        self._coefficient = None if parts is None else parts.coefficient

    @property
    def runs_converted(self) -> bool:
        """Whether the pass that is going on runs this way."""
        return bool(self.layer.runs_converted)

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.layer.name)

    @name.setter
    def name(self, name: str) -> None:
        self.layer.name = name

    @property
    def transport(self) -> Transport:
        """How rows travel."""
        found: Transport = self.layer.transport
        return found

    @transport.setter
    def transport(self, transport: Transport) -> None:
        self.layer.transport = transport

    @property
    def slices(self) -> TokenSlices:
        """Which tokens this rank sends."""
        found: TokenSlices = self.layer.slices
        return found

    @property
    def wire_dtype(self) -> str | None:
        """Number format of rows between ranks."""
        found: str | None = self.layer.wire_dtype
        return found

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.layer.hidden_size)

    @property
    def num_experts(self) -> int:
        """Of all ranks together."""
        return int(self.layer.num_experts)

    @property
    def ep_size(self) -> int:
        """Ranks that share the experts."""
        return int(self.layer.ep_size)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The layer's."""
        found: Iterator[nn.Parameter] = self.layer.parameters()
        return found

    @property
    def shared_module(self) -> nn.Module | None:
        """The source's shared experts, or the one that the conversion has added; None: there is none."""
        return self._added if self.layer.shared_experts is None else self.layer.shared_experts

    def begin(self, shortcut: Tensor, used_token: Tensor | None = None, **how: Any) -> RoutedTokens:
        """As the layer's, for `top_k` experts per token."""
        found: RoutedTokens = self.layer.begin(shortcut, used_token, top_k=self.top_k, **how)
        return found

    def shared(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] → the same, or [T, D]. There is a `shared_module`."""
        output: Tensor = (self.layer.shared if self._added is None else self._added)(hidden_states)
        return output

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the layer's, with the merge of eq. 14 to 17 in the place of its sum."""
        known, late = self._weighed(routed, hidden_states, shared)
        output = late() if known is None else late() + known
        return output, routed.routing.l_aux, routed.routing.exp_counts

    def finish_in_parts(self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None) -> Parts:
        """As `finish`, without waiting for the combine. Without a shared expert, zeros are what is known."""
        known, late = self._weighed(routed, hidden_states, shared)
        if known is None:
            known = self._shaped(torch.zeros_like(hidden_states))
        return Parts(known, late, routed.routing.l_aux, routed.routing.exp_counts)

    def _weighed(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None
    ) -> tuple[Tensor | None, Callable[[], Tensor]]:
        """The weighted output of the shared expert, and what waits for that of the routed ones."""
        if shared is None and self.shared_module is not None:
            shared = self.shared(hidden_states)
        of_shared, of_routed = merge_weights(self.merge, hidden_states, self._coefficient)
        if shared is not None:
            shared = self._shaped(weighted(shared.reshape(hidden_states.shape), of_shared))
        return shared, partial(self._late, routed, of_routed)

    def _late(self, routed: RoutedTokens, weight: Tensor | None) -> Tensor:
        return self._shaped(weighted(routed.collect(), weight))

    def _shaped(self, output: Tensor) -> Tensor:
        """As the model expects it, [B, S, D] or [T, D]."""
        return output.reshape(-1, self.hidden_size) if self.layer.moe_output_shape == "flat" else output
