"""The ScMoE layer: DeepSpeed's Residual MoE whose routed branch reads another layer and runs in stages.

    routed = layer.begin(tap)                # gate, encode, dispatch in flight
    routed.run_experts()                     # waits for the dispatch, runs the experts, combine in flight
    shared = layer.shared(hidden_states)     # the shared expert, whenever it suits
    output, l_aux, exp_counts = layer.finish(routed, hidden_states, shared)   # waits, decodes, merges

It is a `deepspeed.moe.layer.MoE`, because DeepSpeed's engine finds expert parameters, expert-data-parallel groups and
per-expert checkpoint files by that class and by the parameter path `.deepspeed_moe.experts.deepspeed_experts.<i>`.
The layer holds no normalisation: both inputs come in normalised.

Shape suffixes: T tokens (B * S), D hidden, E experts, L local experts, P expert-parallel ranks, C capacity,
R rows that this rank sends, S rows that it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.moe.dispatch import ExactLayout, PaddedLayout, ReceivedRows, decode
from scmoe_ds.moe.experts import initialize_experts, run_experts
from scmoe_ds.moe.gate import Routing, route
from scmoe_ds.moe.merge import Merge, coefficient_network, merge_outputs
from scmoe_ds.overlap.all_to_all import InFlight, start, start_counts
from scmoe_ds.overlap.transport import METHODS, Transport
from scmoe_ds.overlap.wire import WIRE_DTYPES


class ScMoE(MoE):
    """Shortcut-connected MoE: shared expert on the current layer, routed experts on a preceding one (paper eq. 7).

    Args:
        hidden_size … top2_2nd_expert_sampling: as in `deepspeed.moe.layer.MoE`. `use_residual` is on: the shared
            expert is `mlp`, the coefficient network `coefficient`, as in DeepSpeed's Residual MoE.
        merge: "add" (eq. 7), "cg1" (eq. 14-15) or "cg2" (eq. 16-17; DeepSpeed's own merge and weight layout).
        dispatch: "exact" sends and computes routed tokens only; "padded" uses DeepSpeed's capacity buffers.
        gate_softmax: "before_topk" as DeepSpeed, "after_topk" as paper eq. 2-3.
        all_to_all: primitive of dispatch and combine, see scmoe_ds.overlap.transport.
        wire_dtype: None, "bf16" or "fp8": number format of rows and their gradients between ranks.

    Raises:
        ValueError: sizes that do not divide, an unknown merge or dispatch, or a layer with `ep_size` > 1 that is
            built before `deepspeed.init_distributed()` (its experts' initialisation depends on the rank).
    """

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
        use_residual: bool = True,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        *,
        merge: Merge = "cg1",
        dispatch: Literal["exact", "padded"] = "exact",
        gate_softmax: Literal["before_topk", "after_topk"] = "before_topk",
        all_to_all: str = "collective",
        wire_dtype: str | None = None,
    ) -> None:
        self._check(num_experts, ep_size, k, use_residual, use_tutel)
        for name, value, choices in (
            ("merge", merge, ("add", "cg1", "cg2")),
            ("dispatch", dispatch, ("exact", "padded")),
            ("gate_softmax", gate_softmax, ("before_topk", "after_topk")),
            ("all_to_all", all_to_all, METHODS),
            ("wire_dtype", wire_dtype, (None, *WIRE_DTYPES)),
        ):
            if value not in choices:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        super().__init__(hidden_size, expert, num_experts, ep_size, k, capacity_factor, eval_capacity_factor,
                         min_capacity, use_residual, noisy_gate_policy, drop_tokens, use_rts, False,
                         enable_expert_tensor_parallelism, top2_2nd_expert_sampling)  # fmt: skip
        self.merge: Merge = merge
        self.dispatch = dispatch
        self.gate_softmax = gate_softmax
        self.wire_dtype = wire_dtype
        self.transport = Transport(None, all_to_all)
        if use_residual:
            self.coefficient = coefficient_network(merge, hidden_size)
        # DeepSpeed gives the experts of one layer to consecutive ranks; set_deepspeed_parallelism checks it.
        self.ep_rank = dist.get_rank() % ep_size if ep_size > 1 else 0
        initialize_experts(self.deepspeed_moe.experts, self.ep_rank * self.num_local_experts)

    _needs_residual = True

    @classmethod
    def _check(cls, num_experts: int, ep_size: int, k: int, use_residual: bool, use_tutel: bool) -> None:
        if num_experts % ep_size:
            raise ValueError(f"num_experts = {num_experts} must be divisible by ep_size = {ep_size}")
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k} must be between 1 and num_experts = {num_experts}")
        if use_residual != cls._needs_residual:
            raise ValueError(f"{cls.__name__} is defined with use_residual={cls._needs_residual} only; "
                             "for a standard MoE use deepspeed.moe.layer.MoE")  # fmt: skip
        if use_tutel:
            raise ValueError("use_tutel: ScMoE brings its own dispatch; leave it False")
        if ep_size > 1 and not dist.is_initialized():
            raise ValueError(f"ep_size = {ep_size}: build the layer after deepspeed.init_distributed()")

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Takes (or creates) DeepSpeed's expert-parallel groups; DeepSpeed's engine calls it, once more is harmless.

        Raises:
            ValueError: a rank order for which the experts were not initialised.
        """
        if self.deepspeed_moe.ep_group is not None:
            return
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        if dist.get_rank(self.deepspeed_moe.ep_group) != self.ep_rank:
            raise ValueError("ScMoE's experts are laid out over consecutive ranks; "
                             'remove "use_data_before_expert_parallelism" from the DeepSpeed JSON')  # fmt: skip
        if self.ep_size > 1:
            self.transport = Transport(self.deepspeed_moe.ep_group, self.transport.method)

    def begin(
        self,
        shortcut: Tensor,
        used_token: Tensor | None = None,
        *,
        exclude: Tensor | None = None,
        blocking: bool = False,
    ) -> RoutedTokens:
        """Gates and encodes the preceding layer's tokens and sends them to their experts.

        Args:
            shortcut: [..., D] normalised representation of the preceding layer; may or may not require grad.
            used_token: [T] mask of real tokens, as in DeepSpeed (k = 1).
            exclude: [T] expert that a token may not choose, -1 for none (k = 1).
            blocking: communicate without overlap, forward and backward.

        Raises:
            ValueError: a last dimension other than the hidden size.
            RuntimeError: an expert-parallel layer without groups.
        """
        hidden_size = self.deepspeed_moe.gate.wg.in_features
        if shortcut.shape[-1] != hidden_size:
            raise ValueError(f"shortcut of shape {tuple(shortcut.shape)}: the last dimension must be {hidden_size}")
        if self.ep_size > 1 and self.deepspeed_moe.ep_group is None:
            raise RuntimeError("call layer.set_deepspeed_parallelism() (or initialize the engine) before the first use")
        tokens_TD = shortcut.reshape(-1, hidden_size)
        routing = route(self.deepspeed_moe.gate, tokens_TD, used_token, exclude, self.gate_softmax,
                        common_capacity=self.dispatch == "padded")  # fmt: skip
        return RoutedTokens(self, tokens_TD, routing, shortcut.shape, blocking)

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
        if shared is None:
            shared = self.shared(hidden_states)
        output = merge_outputs(self.merge, shared, routed.collect(), hidden_states, self.coefficient)
        return output, routed.routing.l_aux, routed.routing.exp_counts

    def forward(
        self, hidden_states: Tensor, used_token: Tensor | None = None, shortcut: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All stages in one go; DeepSpeed's signature and returns, plus `shortcut`.

        Without `shortcut` the routed experts read `hidden_states`, which makes this DeepSpeed's Residual MoE. The
        shared expert still runs beside the communication.
        """
        routed = self.begin(hidden_states if shortcut is None else shortcut, used_token)
        routed.run_experts()
        return self.finish(routed, hidden_states)


class RoutedTokens:
    """Tokens on their way to their experts and back; made by `ScMoE.begin`, used up by `finish`.

    Attributes:
        routing: who goes where, with what weight.
    """

    def __init__(self, layer: ScMoE, tokens_TD: Tensor, routing: Routing, shape: Sequence[int], blocking: bool) -> None:
        self.routing = routing
        self._experts = layer.deepspeed_moe.experts
        self._ranks_and_experts = (layer.ep_size, layer.num_local_experts)
        self._transport, self._wire_dtype = layer.transport, layer.wire_dtype
        self._shape, self._blocking = shape, blocking
        self._received: ReceivedRows | None = None
        self._send_rows: list[int] | None = None
        self._receive_rows: list[int] | None = None
        self._layout = PaddedLayout.of(routing) if layer.dispatch == "padded" else ExactLayout.of(routing)
        self._dispatch: InFlight | None = self._start_dispatch(tokens_TD)
        self._combine: InFlight | None = None

    def _start_dispatch(self, tokens_TD: Tensor) -> InFlight:
        if isinstance(self._layout, PaddedLayout):
            return self._start(self._layout.encode(tokens_TD))
        counts = start_counts(self._layout.rows_per_expert_E, self._transport)
        rows_RD = self._layout.encode(tokens_TD)  # while the counts travel
        received_PL = counts.wait().view(self._ranks_and_experts).tolist()
        self._received = ReceivedRows.of(received_PL, rows_RD.device)
        self._send_rows = self._layout.rows_per_expert_E.view(self._ranks_and_experts).sum(1).tolist()
        self._receive_rows = [sum(rows) for rows in received_PL]
        return self._start(rows_RD)

    def _start(self, rows: Tensor, back: bool = False) -> InFlight:
        send, receive = self._send_rows, self._receive_rows
        if back:
            send, receive = receive, send
        return start(rows, self._transport, send, receive, self._blocking, self._wire_dtype)

    def run_experts(self) -> None:
        """Waits for the dispatch, computes the local experts, and sends the results back.

        Raises:
            RuntimeError: the experts have run already.
        """
        dispatch, self._dispatch = self._dispatch, None
        if dispatch is None:
            raise RuntimeError("run_experts was called twice on the same routed tokens; begin again for another use")
        rows_SD = dispatch.wait()
        if self._received is None:
            buffer_PLCD = rows_SD.view(*self._ranks_and_experts, -1, rows_SD.shape[-1])
            output_SD = self._experts(buffer_PLCD).reshape(rows_SD.shape)
        else:
            output_SD = run_experts(self._experts, self._received.group(rows_SD), self._received.rows_per_expert)
            output_SD = self._received.ungroup(output_SD)
        self._combine = self._start(output_SD, back=True)

    def collect(self) -> Tensor:
        """Waits for the combine and decodes: Σ G·E of eq. 1, in the shape of the shortcut.

        Raises:
            RuntimeError: the experts have not run, or the result was taken before.
        """
        if self._dispatch is not None:
            raise RuntimeError("finish was called before run_experts")
        combine, self._combine = self._combine, None
        if combine is None:
            raise RuntimeError("these routed tokens were finished already; begin again for another use")
        rows_RD = combine.wait()
        return decode(rows_RD, self._layout.row_of_choice_KT, self.routing.weight_KT).view(self._shape)


class DGMoE(ScMoE):
    """Double gating (paper eq. 23): the same experts read both layers, top-1 each, and no shared expert.

    If both layers choose the same expert for a token, the current layer takes its second-ranked one. A choice that
    the capacity limit dropped is not computed and therefore leaves its expert free.
    """

    _needs_residual = False

    def __init__(self, hidden_size: int, expert: nn.Module, *args: object, **kwargs: object) -> None:
        super().__init__(hidden_size, expert, *args, **{"use_residual": False, **kwargs})  # type: ignore[arg-type]
        if self.deepspeed_moe.gate.k != 1 or self.num_experts < 2:
            raise ValueError("DGMoE routes each layer's token to one of at least two experts: k = 1, num_experts >= 2")

    def shared(self, hidden_states: Tensor) -> Tensor:
        raise TypeError("DGMoE has no shared expert")

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Routes the current layer around the preceding layer's choices and adds both results.

        Returns:
            output [..., D], mean of the two load-balancing losses, tokens per expert of both choices [E].
        """
        current = self.begin(hidden_states, exclude=routed.routing.expert_KT[0])
        current.run_experts()
        output = current.collect() + routed.collect()
        l_aux = torch.stack([routed.routing.l_aux, current.routing.l_aux]).mean()
        return output, l_aux, routed.routing.exp_counts + current.routing.exp_counts
