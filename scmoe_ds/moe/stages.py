"""A MoE layer in stages, as pairs, planner and engine see it, whoever wrote its router and its experts.

    routed = layer.begin(hidden_states)      # router, encode, dispatch in flight
    routed.run_experts()                     # waits for the dispatch, runs the experts, combine in flight
    output, l_aux, exp_counts = layer.finish(routed, hidden_states)     # waits for the combine, decodes

Shape suffixes: D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.slices import TokenSlices


class StagedLayer(Protocol):
    """What `StagedMoE` and `ScheduledAutoEP` have in common. Those with a shared expert have `shared` as well.

    Attributes:
        name: for messages.
        transport, slices: how rows travel, and which tokens this rank sends.
        dispatch: "exact" or "padded".
        wire_dtype: None, "bf16" or "fp8": number format of rows between ranks.
        num_experts, ep_size: routed experts of all ranks together, and ranks that share them.
    """

    name: str
    transport: Transport
    slices: TokenSlices
    dispatch: Any
    wire_dtype: str | None
    num_experts: int
    ep_size: int

    @property
    def hidden_size(self) -> int:
        """D, the width of a token."""

    @property
    def top_k(self) -> int:
        """Routed experts per token."""

    def begin(self, shortcut: Tensor, used_token: Tensor | None = None, **how: Any) -> Any:
        """Routes and encodes tokens [..., D] and sends them to their experts; see `StagedMoE.begin`."""

    def finish(self, routed: Any, hidden_states: Tensor, shared: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the combine and decodes: output [..., D], load-balancing loss, tokens per expert [E]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any module."""


def staged_layers(model: nn.Module) -> list[Any]:
    """Every `StagedLayer` of a model, in the order of its modules."""
    return [each for each in model.modules() if isinstance(getattr(each, "transport", None), Transport)]
