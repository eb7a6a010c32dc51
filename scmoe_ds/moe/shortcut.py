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

from scmoe_ds.config.names import Dispatch, GateSoftmax, Merge
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.moe.checks import check_input
from scmoe_ds.moe.layer import Layer, StagedMoE, check_choice
from scmoe_ds.moe.merge import coefficient_network, merge_outputs, merge_weights, weighted
from scmoe_ds.moe.parts import Parts
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.router import RouterGate


class ScMoE(StagedMoE):
    """Shortcut-connected MoE: shared expert on the current layer, routed experts on a preceding one (paper eq. 7).

    It is a `deepspeed.moe.layer.MoE` with `use_residual=True`: the shared expert is `mlp`, the coefficient network
    `coefficient`. It holds no norm: both inputs come in normalised.

    Example:
        ```python
        layer = scmoe_ds.ScMoE(hidden_size, expert, num_experts=8, ep_size=8)
        routed = layer.begin(tap_norm(tap))  # tap: the preceding layer's residual stream, [B, S, D]
        routed.run_experts()
        output, l_aux, exp_counts = layer.finish(routed, norm(hidden))
        ```

    Args:
        hidden_size: D, the last dimension of both inputs and of the output.
        expert: [rows, D] → [rows, D], or a tuple that begins with it. It is copied once per expert of this rank; the
            shared expert is this very module.
        num_experts: routed experts of all ranks together; divisible by `ep_size`.
        ep_size: ranks that share one set of experts. More than 1 needs a process group before the layer is built.
        k: routed experts per token.
        capacity_factor: tokens per expert in training, relative to an even split.
        eval_capacity_factor: the same in evaluation.
        min_capacity: least number of tokens that each expert accepts.
        use_residual: None or True; here for DeepSpeed's signature.
        noisy_gate_policy: None, "Jitter", or "RSample" (k = 1).
        drop_tokens: False: every token reaches its experts, however many an expert gets.
        use_rts: k = 1: which tokens are dropped is random, not by their place.
        use_tutel: False; the layer brings its own dispatch.
        enable_expert_tensor_parallelism: each expert is divided between the tensor-parallel ranks.
        top2_2nd_expert_sampling: k = 2: the second expert is sampled (Gumbel), in evaluation too.
        merge: "add" (eq. 7), "cg1" (eq. 14-15) or "cg2" (eq. 16-17; DeepSpeed's own merge and weight layout).
        dispatch: "exact" sends and computes routed tokens only; "padded" uses DeepSpeed's capacity buffers.
        gate_softmax: among which experts a token's weights add up to 1: "all", the "chosen" ones (eq. 2-3), or those
            "kept" by the capacity; "deepspeed": all for k = 1, kept for more.
        all_to_all: primitive of dispatch and combine: "collective" or "send_receive"; `initialize` sets the section's.
        wire_dtype: None, "bf16" or "fp8": number format of rows and their gradients between ranks.
        router: how tokens choose their experts; None: DeepSpeed's gate. One with a score function reads neither
            `gate_softmax` nor `top2_2nd_expert_sampling`. Its weights are the gate's.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or `ep_size` > 1 before there is a process group.
    """

    _needs_residual = True

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool | None = None,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        merge: Merge = "cg1",
        dispatch: Dispatch = "exact",
        gate_softmax: GateSoftmax = "deepspeed",
        all_to_all: str = "collective",
        wire_dtype: str | None = None,
        router: RouterConfig | None = None,
    ) -> None:
        check_choice("merge", merge, get_args(Merge))
        super().__init__(
            hidden_size,
            expert,
            num_experts,
            ep_size,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            use_residual,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            use_tutel,
            enable_expert_tensor_parallelism,
            top2_2nd_expert_sampling,
            dispatch=dispatch,
            gate_softmax=gate_softmax,
            all_to_all=all_to_all,
            wire_dtype=wire_dtype,
            router=router,
        )
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
            layer.coefficient = coefficient_network(merge, layer.hidden_size)
        return layer

    @property
    def shared_module(self) -> nn.Module | None:
        """The shared expert."""
        return self.mlp

    def shared(self, hidden_states: Tensor) -> Tensor:
        """The shared expert, SE of eq. 7; an operator like any other, so that a dispatch or combine can run beside it.

        Args:
            hidden_states: [..., D] the current layer's normalised input.

        Returns:
            [..., D]
        """
        output = self.mlp(hidden_states)
        return output[0] if isinstance(output, tuple) else output

    def merging(self) -> tuple[Merge, nn.Linear | None]:
        """How `finish` merges, and the coefficient network for it."""
        return self.merge, self.coefficient

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
            ValueError: `routed` is another layer's, or `hidden_states` has another shape than the shortcut had.
            RuntimeError: `routed` was finished before, or its experts have not run.
        """
        self._require_alike(routed, hidden_states)
        if shared is None:
            shared = self.shared(hidden_states)
        collected = routed.collect()
        shared, collected, hidden_states = routed.exchange.recorder.open("merge", shared, collected, hidden_states)
        merge, coefficient = self.merging()
        output = merge_outputs(merge, shared, collected, hidden_states, coefficient)
        (output,) = routed.exchange.recorder.close("merge", output)
        return output, routed.routing.l_aux, routed.routing.exp_counts

    def finish_in_parts(self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None) -> Parts:
        """As `finish`, without waiting for the combine. The coefficient weighs each part where it is ready."""
        self._require_alike(routed, hidden_states)
        recorder = routed.exchange.recorder
        if shared is None:
            shared = self.shared(hidden_states)
        shared, hidden_states = recorder.open("merge", shared, hidden_states)
        merge, coefficient = self.merging()
        shared_weight, routed_weight = merge_weights(merge, hidden_states, coefficient)
        known, routed_weight = recorder.close("merge", weighted(shared, shared_weight), routed_weight)

        def late() -> Tensor:
            collected, weight = recorder.open("merge", routed.collect(), routed_weight)
            return recorder.close("merge", weighted(collected, weight))[0]

        return Parts(known, late, routed.routing.l_aux, routed.routing.exp_counts)

    def _require_alike(self, routed: RoutedTokens, hidden_states: Tensor) -> None:
        check_input("hidden_states", hidden_states, self.hidden_size)
        self._require_own(routed)
        if routed.shape != hidden_states.shape:
            raise ValueError(
                f"shortcut {tuple(routed.shape)} and hidden_states {tuple(hidden_states.shape)}: "
                "they must be the same tokens"
            )


class DGMoE(StagedMoE):
    """Double gating (paper eq. 23): the same experts read both layers, top-1 each, and no shared expert.

    If both layers choose the same expert for a token, the current layer takes its second-ranked one. A choice that
    the capacity limit dropped is not computed and therefore leaves its expert free.
    """

    def __init__(self, hidden_size: int, expert: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(hidden_size, expert, *args, **kwargs)
        if self.top_k != 1 or self.num_experts < 2:
            raise ValueError("DGMoE routes each layer's token to one of at least two experts: k = 1, num_experts >= 2")
        gate = self.deepspeed_moe.gate
        if isinstance(gate, RouterGate) and gate.router.num_expert_groups is not None:
            raise ValueError("router.num_expert_groups: DGMoE's second choice may need another group; leave it out")

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Routes the current layer around the preceding layer's choices and adds both results.

        Returns:
            output [..., D], mean of the two load-balancing losses, tokens per expert of both choices [E].
        """
        parts = self.finish_in_parts(routed, hidden_states)
        return parts.late(), parts.l_aux, parts.exp_counts

    def finish_in_parts(self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None) -> Parts:
        """As `finish`; the combines of both layers' choices go on."""
        self._require_own(routed)
        current = self.begin(
            hidden_states,
            routed.routing.used_token,
            exclude=routed.gated.expert_KT[0],  # not places, nor without what a rule leaves out
            blocking=routed.exchange.blocking,
            recorder=routed.exchange.recorder.renamed("current"),
        )
        current.run_experts()
        l_aux = torch.stack([routed.routing.l_aux, current.routing.l_aux]).mean()
        exp_counts = routed.routing.exp_counts + current.routing.exp_counts
        return Parts(None, lambda: current.collect() + routed.collect(), l_aux, exp_counts)
