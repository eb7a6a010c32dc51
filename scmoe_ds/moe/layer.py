"""DeepSpeed's MoE layer in stages, between which other work can be done.

    routed = layer.begin(hidden_states)      # gate, encode, dispatch in flight
    routed.run_experts()                     # waits for the dispatch, runs the experts, combine in flight
    output, l_aux, exp_counts = layer.finish(routed, hidden_states)     # waits for the combine, decodes

The layer is a `deepspeed.moe.layer.MoE`. By this class and by the parameter path
`.deepspeed_moe.experts.deepspeed_experts.<i>` DeepSpeed's engine finds expert parameters, expert-data-parallel groups
and per-expert checkpoint files.

Shape suffixes: T tokens (B * S), D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any, Literal, TypeVar, get_args

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import bwc, groups
from torch import Tensor, nn

from scmoe_ds.comm.transport import METHODS, Transport
from scmoe_ds.comm.wire import WIRE_DTYPES
from scmoe_ds.config.names import FORMER_GATE_SOFTMAX, GateSoftmax
from scmoe_ds.config.router_section import RouterConfig
from scmoe_ds.moe.checks import check_arguments, check_count, check_input
from scmoe_ds.moe.decisions.partition import Partition, whole_experts
from scmoe_ds.moe.early import EarlyRule, RoutingRule, apply_rule, early_rule_of
from scmoe_ds.moe.exchange import Exchange
from scmoe_ds.moe.experts import count_on_all_ranks, initialize_experts
from scmoe_ds.moe.gate import route
from scmoe_ds.moe.identity import without_identity_rows
from scmoe_ds.moe.parts import Parts
from scmoe_ds.moe.placement import mpu_tensor_parallel_size, own_expert_parallel_rank, own_first_expert
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.router import equip
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.parallel.agreement import require_agreement, run_together
from scmoe_ds.parallel.groups import travel_group
from scmoe_ds.trace.recorder import SILENT, PairRecorder

Layer = TypeVar("Layer", bound="StagedMoE")
_SIGNATURE = signature(MoE.__init__)


class StagedMoE(MoE):
    """DeepSpeed's standard MoE with the stages of this package: top-k routed experts, no shared one.

    Args:
        hidden_size … top2_2nd_expert_sampling: as in `deepspeed.moe.layer.MoE`.
        dispatch: "exact" sends and computes routed tokens only; "padded" uses DeepSpeed's capacity buffers.
        gate_softmax: among which experts a token's weights add up to 1: "all", the "chosen" ones (paper eq. 2-3), or
            those "kept" by the capacity; "deepspeed": all for k = 1, kept for more.
        all_to_all: primitive of dispatch and combine, see scmoe_ds.comm.transport.
        wire_dtype: None, "bf16" or "fp8": number format of rows and their gradients between ranks.
        router: how tokens choose their experts; None: DeepSpeed's gate. One with a score function reads neither
            `gate_softmax` nor `top2_2nd_expert_sampling`. Its weights are the gate's.

    Raises:
        ValueError: sizes that do not divide, an unknown choice, or a layer with `ep_size` > 1 that is built before
            `scmoe_ds.connect()` (its experts' initialisation depends on the rank).
    """

    name = "a MoE layer"
    """For messages; `scmoe_ds.initialize` numbers the layers."""
    partition: Partition | None = None
    """The experts are parts of those that the gate chooses from (`divide_experts`); None: they are whole."""
    routing_rule: RoutingRule | None = None
    early_rule: EarlyRule | None = None
    """Decisions between the gate and the dispatch (moe/early.py); None: there are none."""
    _needs_residual = False
    _initialized_as: int | None = None
    """The expert-parallel rank that the experts were initialised for; None: DeepSpeed initialised them, all alike."""

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
        *args: Any,
        dispatch: Literal["exact", "padded"] = "exact",
        gate_softmax: GateSoftmax = "deepspeed",
        all_to_all: str = "collective",
        wire_dtype: str | None = None,
        router: RouterConfig | None = None,
        **kwargs: Any,
    ) -> None:
        capacity = capacity_factor, eval_capacity_factor, min_capacity
        sizes = (hidden_size, expert, num_experts, ep_size, k, *capacity, bool(use_residual))
        check_arguments(_SIGNATURE.bind(self, *sizes, *args, **kwargs).arguments)
        self._check_sizes(num_experts, ep_size, k)
        super().__init__(hidden_size, expert, num_experts, ep_size, k, *capacity, self._needs_residual, *args, **kwargs)
        if use_residual not in (None, self._needs_residual):
            raise ValueError(
                f"{type(self).__name__} is defined with use_residual={self._needs_residual} only; ScMoE has a shared "
                "expert, StagedMoE and deepspeed.moe.layer.MoE do without"
            )
        self._set_up(dispatch, gate_softmax, all_to_all, wire_dtype, router)
        self._initialized_as = own_expert_parallel_rank(self)
        initialize_experts(self.deepspeed_moe.experts, own_first_expert(self))

    @classmethod
    def adopt(cls: type[Layer], moe: MoE, **settings: Any) -> Layer:
        """A layer with the modules, parameters and sizes of one of DeepSpeed's, which has no process groups yet.

        Both layers hold the same modules from then on. Nothing is initialised.

        Args:
            moe: a layer without a shared expert; `ScMoE` takes one with it, too.
            settings: `dispatch`, `gate_softmax`, `all_to_all`, `wire_dtype` and `router`, as for the class.

        Raises:
            ValueError: an unknown choice.
        """
        layer = cls.__new__(cls)  # `__init__` would make new experts
        nn.Module.__init__(layer)
        layer.__dict__.update({name: value for name, value in vars(moe).items() if name not in vars(layer)})
        layer.training = moe.training
        for name, child in moe.named_children():
            layer.add_module(name, child)
        layer._set_up(**settings)
        return layer

    def _set_up(
        self,
        dispatch: Literal["exact", "padded"] = "exact",
        gate_softmax: GateSoftmax = "deepspeed",
        all_to_all: str = "collective",
        wire_dtype: str | None = None,
        router: RouterConfig | None = None,
    ) -> None:
        gate_softmax = FORMER_GATE_SOFTMAX.get(gate_softmax, gate_softmax)
        check_choice("dispatch", dispatch, ("exact", "padded"))
        check_choice("gate_softmax", gate_softmax, get_args(GateSoftmax))
        check_choice("all_to_all", all_to_all, METHODS)
        check_choice("wire_dtype", wire_dtype, (None, *WIRE_DTYPES))
        self.dispatch, self.gate_softmax, self.wire_dtype = dispatch, gate_softmax, wire_dtype
        self.transport, self.slices = Transport(None, all_to_all), TokenSlices()
        if router is not None and router != RouterConfig():
            equip(self.deepspeed_moe.gate, router)

    @property
    def hidden_size(self) -> int:
        """D, the width of a token."""
        return int(self.deepspeed_moe.gate.wg.in_features)

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return int(self.deepspeed_moe.gate.k)

    @staticmethod
    def _check_sizes(num_experts: int, ep_size: int, k: int) -> None:
        if num_experts % ep_size:
            raise ValueError(f"num_experts = {num_experts} must be divisible by ep_size = {ep_size}")
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k} must be between 1 and num_experts = {num_experts}")
        if ep_size > 1 and not dist.is_initialized():
            raise ValueError(f"ep_size = {ep_size}: build the layer after scmoe_ds.connect()")

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Takes or creates DeepSpeed's expert-parallel groups. The engine calls it; a second call does nothing.

        Raises:
            ValueError: a rank order for which the experts were not initialised, experts that differ in shape between
                ranks, or an expert-parallel size that does not fit the tensor-parallel one.
        """
        if self.deepspeed_moe.ep_group is not None:
            return
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
        run_together(self._check_rank)  # a rank that raised alone would leave the others in the next collective
        if self.ep_size > 1:
            # Experts that differ in shape would exchange rows that do not fit.
            shapes = [(tuple(each.shape), str(each.dtype)) for each in self.deepspeed_moe.experts.parameters()]
            require_agreement(
                "the shape of a layer's experts", shapes, self.deepspeed_moe.ep_group, "build the same model on all"
            )
        tp_size = 1 if self.enable_expert_tensor_parallelism else mpu_tensor_parallel_size()
        if self.ep_size % tp_size and tp_size % self.ep_size:
            raise ValueError(f"ep_size = {self.ep_size} and tensor-parallel size {tp_size}: one must divide the other")
        if tp_size > 1:
            count_on_all_ranks(self.deepspeed_moe.experts)
        ep_group, tp_is_larger = self.deepspeed_moe.ep_group, tp_size > self.ep_size
        group = bwc.bwc_tensor_model_parallel_group(groups.mpu) if tp_is_larger else ep_group
        self.slices = TokenSlices(dist.get_rank(group), tp_size, self.ep_size)
        if self.slices.group_size > 1:
            group = travel_group(dist.get_process_group_ranks(group))
            self.transport = Transport(group, self.transport.method)

    def _check_rank(self) -> None:
        expected = own_expert_parallel_rank(self)
        if dist.get_rank(self.deepspeed_moe.ep_group) != expected or self._initialized_as not in (None, expected):
            raise ValueError(
                "ScMoE's experts are laid out over consecutive ranks (with expert tensor parallelism, over those of "
                'one tensor-parallel rank): remove "use_data_before_expert_parallelism" from the DeepSpeed JSON, and '
                "set deepspeed.utils.groups.mpu before the model is built"
            )

    def begin(
        self,
        shortcut: Tensor,
        used_token: Tensor | None = None,
        *,
        exclude: Tensor | None = None,
        blocking: bool = False,
        num_chunks: int = 1,
        recorder: PairRecorder = SILENT,
    ) -> RoutedTokens:
        """Gates and encodes tokens and sends them to their experts. Collective over the expert-parallel ranks.

        Args:
            shortcut: [..., D] what the routed experts read, in the dtype of the layer's parameters or under autocast.
                Hand it over normalised, e.g. `norm(tap)`: the layer holds no norm. It may or may not require grad.
            used_token: mask of T elements, zero for padding, which is routed to no expert (any k).
            exclude: [T] expert that a token may not choose, -1 for none (k = 1).
            blocking: communicate without overlap, forward and backward.
            num_chunks: pieces of the routed tokens; call `run_experts` once for each.
            recorder: is told what happens when.

        Returns:
            the tokens in flight. Call `run_experts` on them once per chunk, then this layer's `finish`.

        Raises:
            ValueError: no floating-point tensor whose last dimension is the hidden size, a mask of other tokens, or
                fewer than one chunk.
            RuntimeError: an expert-parallel layer without groups.
        """
        check_input("shortcut", shortcut, self.hidden_size)
        if self.deepspeed_moe.ep_group is None and (self.ep_size > 1 or mpu_tensor_parallel_size() > 1):
            raise RuntimeError("call layer.set_deepspeed_parallelism() (or initialize the engine) before the first use")
        check_count("num_chunks", num_chunks)
        tokens_TD = shortcut.reshape(-1, self.hidden_size)
        (gated_TD,) = recorder.open("gate", tokens_TD)
        # Padded buffers have the same size on all ranks, even if the numbers of tokens differ.
        group = self.deepspeed_moe.ep_group if self.dispatch == "padded" else None
        experts, early = self.deepspeed_moe.experts, early_rule_of(self)
        facts = not (self.routing_rule is None and early is None) or getattr(experts, "notices", 0) > 0
        routing = route(self.deepspeed_moe.gate, gated_TD, used_token, exclude, self.gate_softmax, group, facts)
        weight_KT, l_aux = recorder.close("gate", routing.weight_KT, routing.l_aux)
        gated = without_identity_rows(replace(routing, weight_KT=weight_KT, l_aux=l_aux), whole_experts(self))
        exact, deferred = self.dispatch == "exact", shortcut.is_cuda and not blocking
        exchange = Exchange(
            self.transport, self.slices, exact, self.wire_dtype, blocking, num_chunks, deferred, recorder, self.name
        )
        return RoutedTokens(experts, tokens_TD, apply_rule(self, gated), shortcut.shape, exchange, early, gated)

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the combine and decodes; see `ScMoE.finish`."""
        self._require_own(routed)
        return routed.collect(), routed.routing.l_aux, routed.routing.exp_counts

    def finish_in_parts(self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None) -> Parts:
        """As `finish`, without waiting for the combine: it goes on until the caller asks for the late part."""
        self._require_own(routed)
        return Parts(None, routed.collect, routed.routing.l_aux, routed.routing.exp_counts)

    def _require_own(self, routed: RoutedTokens) -> None:
        if not isinstance(routed, RoutedTokens):
            raise ValueError(f"routed is a {type(routed).__name__}: finish takes what this layer's begin returned")
        if routed.experts is not self.deepspeed_moe.experts:
            raise ValueError("these routed tokens are another layer's: finish them with the layer that began them")

    def forward(
        self, hidden_states: Tensor, used_token: Tensor | None = None, shortcut: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All stages in one go, without overlap; DeepSpeed's signature and returns, plus `shortcut`.

        Args:
            hidden_states: [..., D] the current layer's normalised input.
            used_token: mask of T elements, zero for padding; None: no padding.
            shortcut: [..., D] what the routed experts read, normalised. None: they read `hidden_states`. Then the layer
                is DeepSpeed's MoE, and ScMoE its Residual MoE with the shared expert beside the combine.

        Returns:
            output [..., D], load-balancing loss (scalar fp32), tokens per expert before drops [E].

        Raises:
            ValueError, RuntimeError: as `begin` and `finish`.
        """
        routed = self.begin(hidden_states if shortcut is None else shortcut, used_token)
        routed.run_experts()
        return self.finish(routed, hidden_states)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")
