"""The paper's layers, whose routed experts read a preceding layer: ScMoE and DGMoE.

    routed = layer.begin(tap)                # gate, encode, dispatch in flight
    routed.run_experts()                     # waits for the dispatch, runs the experts, combine in flight
    shared = layer.shared(hidden_states)     # the shared expert, whenever it suits
    output, l_aux, exp_counts = layer.finish(routed, hidden_states, shared)   # waits for the combine, decodes, merges

A layer holds no normalisation: both inputs come in normalised.

Shape suffixes: D hidden, E experts.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.config.names import Merge
from scmoe_ds.moe.layer import Layer, StagedMoE, check_choice
from scmoe_ds.moe.merge import coefficient_network, merge_outputs
from scmoe_ds.moe.routed import RoutedTokens


class ScMoE(StagedMoE):
    """Shortcut-connected MoE: shared expert on the current layer, routed experts on a preceding one (paper eq. 7).

    Args:
        hidden_size …: as `StagedMoE`. `use_residual` is on: the shared expert is `mlp`, the coefficient network
            `coefficient`, as in DeepSpeed's Residual MoE.
        merge: "add" (eq. 7), "cg1" (eq. 14-15) or "cg2" (eq. 16-17; DeepSpeed's own merge and weight layout).
    """

    _needs_residual = True

    def __init__(self, hidden_size: int, expert: nn.Module, *args: Any, merge: Merge = "cg1", **kwargs: Any) -> None:
        check_choice("merge", merge, get_args(Merge))
        super().__init__(hidden_size, expert, *args, **kwargs)
        self.merge: Merge = merge
        self.coefficient = coefficient_network(merge, hidden_size)

    @classmethod
    def adopt(
        cls: type[Layer], moe: MoE, *, merge: Merge = "cg2", shared: nn.Module | None = None, **settings: Any
    ) -> Layer:
        """As `StagedMoE.adopt`; a Residual MoE with CG-2 keeps its coefficient network too.

        Args:
            shared: the shared expert of a layer that has none.
        """
        layer = super().adopt(moe, **settings)
        layer.merge = merge
        if shared is not None:
            layer.use_residual, layer.mlp = True, shared
        if shared is not None or merge != "cg2":
            layer.coefficient = coefficient_network(merge, moe.deepspeed_moe.gate.wg.in_features)
        return layer

    def shared(self, hidden_states: Tensor) -> Tensor:
        """The shared expert, SE of eq. 7: [..., D] → [..., D]."""
        output = self.mlp(hidden_states)
        return output[0] if isinstance(output, tuple) else output

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the combine, decodes, and merges with the shared expert.

        Args:
            routed: what `begin` gave, after `run_experts`.
            hidden_states: [..., D] the current layer's normalised input.
            shared: `shared(hidden_states)`; None computes it here.

        Returns:
            output [..., D], load-balancing loss (scalar), tokens per expert before drops [E]; as DeepSpeed's MoE.

        Raises:
            RuntimeError: `routed` was finished before, or its experts have not run.
        """
        if routed.shape != hidden_states.shape:
            raise ValueError(
                f"shortcut {tuple(routed.shape)} and hidden_states {tuple(hidden_states.shape)}: "
                "they must be the same tokens"
            )
        if shared is None:
            shared = self.shared(hidden_states)
        collected = routed.collect()
        shared, collected, hidden_states = routed.exchange.recorder.open("merge", shared, collected, hidden_states)
        output = merge_outputs(self.merge, shared, collected, hidden_states, self.coefficient)
        (output,) = routed.exchange.recorder.close("merge", output)
        return output, routed.routing.l_aux, routed.routing.exp_counts


class DGMoE(StagedMoE):
    """Double gating (paper eq. 23): the same experts read both layers, top-1 each, and no shared expert.

    If both layers choose the same expert for a token, the current layer takes its second-ranked one. A choice that
    the capacity limit dropped is not computed and therefore leaves its expert free.
    """

    def __init__(self, hidden_size: int, expert: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(hidden_size, expert, *args, **kwargs)
        if self.deepspeed_moe.gate.k != 1 or self.num_experts < 2:
            raise ValueError("DGMoE routes each layer's token to one of at least two experts: k = 1, num_experts >= 2")

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Routes the current layer around the preceding layer's choices and adds both results.

        Returns:
            output [..., D], mean of the two load-balancing losses, tokens per expert of both choices [E].
        """
        current = self.begin(
            hidden_states,
            routed.routing.used_T,
            exclude=routed.routing.expert_KT[0],
            blocking=routed.exchange.blocking,
            recorder=routed.exchange.recorder.renamed("current"),
        )
        current.run_experts()
        output = current.collect() + routed.collect()
        l_aux = torch.stack([routed.routing.l_aux, current.routing.l_aux]).mean()
        return output, l_aux, routed.routing.exp_counts + current.routing.exp_counts
