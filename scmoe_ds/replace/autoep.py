"""DeepSpeed's AutoEP layers (`"expert_parallel"` in the JSON) in stages, under a schedule.

DeepSpeed makes them of a Hugging Face model's MoE blocks while it builds the engine. `schedule` then changes such a
layer's class, in place: parameters, their names and marks, buffers and `isinstance` stay, and so do DeepSpeed's
checkpoints, ZeRO and optimizers. Router and experts are DeepSpeed's own and are called as modules, because ZeRO-3
gathers parameters in the hooks of modules.

Shape suffixes: T tokens, D hidden, E experts, K routed experts per token, S rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from scmoe_ds.comm.transport import Transport
from scmoe_ds.moe.balance import BiasBalance
from scmoe_ds.moe.checks import check_input
from scmoe_ds.moe.choices import Choices
from scmoe_ds.moe.decisions.partition import Partition, parts_of
from scmoe_ds.moe.early import EarlyRule, RoutingRule, apply_rule, early_rule_of
from scmoe_ds.moe.exchange import Exchange
from scmoe_ds.moe.experts import OwnExperts
from scmoe_ds.moe.gate import Routing
from scmoe_ds.moe.grouped import GroupedRows
from scmoe_ds.moe.identity import without_identity_rows
from scmoe_ds.moe.order import ByExpert
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.slices import TokenSlices
from scmoe_ds.moe.z_loss import ZLoss
from scmoe_ds.overlap import executor
from scmoe_ds.parallel.groups import travel_group
from scmoe_ds.replace.autoep_router import attached
from scmoe_ds.replace.grouped_parts import divide_grouped
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.recomputation import is_repeated
from scmoe_ds.trace.recorder import SILENT, PairRecorder


class ScheduledAutoEP(AutoEPMoELayer):
    """An AutoEP layer that begins, runs its experts and finishes when a pair says so; a `moe.stages.StagedLayer`.

    Attributes:
        partition: rows go to parts of the experts, whose parameters stay whole; None: to whole experts.
        balance, z_loss: what the "scmoe" section adds to the model's router (replace/autoep_router.py); None: nothing.
        base: runs the stages inside of the layer's own forward, as the model has it.
        student: runs them as a ScMoE, from a tap on; None: the layer cannot be converted.
        converted: which of the two runs the passes that begin from now on; see `moe.conversion.Convertible`.
    """

    name: str
    transport: Transport
    slices: TokenSlices
    wire_dtype: str | None
    dispatch = "exact"
    base: Any
    student: HookedPair | None = None
    converted: bool = False
    balance: BiasBalance | None = None
    z_loss: ZLoss | None = None
    partition: Partition | None = None
    routing_rule: RoutingRule | None = None
    early_rule: EarlyRule | None = None
    own_experts: OwnExperts | None = None
    """Compute in the place of AutoEP's; None: those do."""
    _first_pass_was: bool | None = None

    @property
    def pair(self) -> Any:
        """Who runs the stages of a pass that begins now."""
        return self.student if self.converted and self.student is not None else self.base

    @property
    def runs_converted(self) -> bool:
        """Whether the pass that is going on runs as a ScMoE: what activation checkpointing repeats, as it ran first."""
        if is_repeated() and self._first_pass_was is not None:
            return self._first_pass_was
        if torch.is_grad_enabled():
            self._first_pass_was = self.converted
        return self.converted

    def begin(
        self,
        shortcut: Tensor,
        used_token: Tensor | None = None,
        *,
        blocking: bool = False,
        num_chunks: int = 1,
        recorder: PairRecorder = SILENT,
        top_k: int | None = None,
    ) -> RoutedTokens:
        """Routes and encodes tokens and sends them to their experts; see `StagedMoE.begin`.

        Args:
            shortcut: [..., D] what the router and the experts read.
            used_token: None; AutoEP routes every token.
            top_k: routed experts per token; None: as many as the model has.
        """
        check_input("shortcut", shortcut, self.hidden_size)
        self.router.top_k = self.top_k if top_k is None else top_k
        tokens_TD = shortcut.reshape(-1, self.hidden_size)
        (gated_TD,) = recorder.open("gate", tokens_TD)
        routing = self._route(gated_TD)
        (weight_KT,) = recorder.close("gate", routing.weight_KT)
        routing = without_identity_rows(replace(routing, weight_KT=weight_KT), self.num_experts)
        deferred = shortcut.is_cuda and not blocking
        how = self.wire_dtype, blocking, num_chunks, deferred, recorder, self.name, self.score_apply == "pre"
        exchange = Exchange(self.transport, self.slices, True, *how)
        routing, experts = apply_rule(self, routing), self.own_experts or GroupedRows(self.experts, parts_of(self))
        return RoutedTokens(experts, tokens_TD, routing, shortcut.shape, exchange, early_rule_of(self))

    def _route(self, tokens_TD: Tensor) -> Routing:
        """The router's decision, and its entry in the layer's statistics."""
        with attached(self.z_loss, self.router.gate):
            weight_TK, expert_TK, rows_E = self.router(tokens_TD, self.expert_bias)
        # A reentrant activation checkpoint runs the first pass without gradients, and the repetition with them.
        if not is_repeated() and (torch.is_grad_enabled() or not self.training):
            with torch.no_grad():
                self.tokens_per_expert.add_(rows_E)
            if self.balance is not None and self.training:
                self.balance.count(rows_E)
        expert_KT, counts_E = expert_TK.t().contiguous(), rows_E.long()
        choices = Choices(expert_KT, None, ByExpert.of(expert_KT), counts_E, counts_E)
        weight_KT = weight_TK.t().contiguous()
        score_KT = weight_KT.detach()  # AutoEP's router returns no others
        return Routing(choices, weight_KT, len(tokens_TD), weight_TK.new_zeros(()), score_KT=score_KT)

    def shared(self, hidden_states: Tensor) -> Tensor:
        """The shared experts with their gate, if there is one: [B, S, D] → the same, or [T, D]."""
        flat = self.moe_output_shape == "flat" or self.shared_experts_gate is not None
        entering = hidden_states.reshape(-1, self.hidden_size) if flat else hidden_states
        output = self.shared_experts(entering)
        if self.shared_experts_gate is not None:
            output = torch.sigmoid(self.shared_experts_gate(entering)) * output
        return cast(Tensor, output)

    def finish(
        self, routed: RoutedTokens, hidden_states: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the combine, decodes, and adds the shared experts.

        Returns:
            output [B, S, D] or [T, D], as the model expects it; 0, because the model adds its own balancing loss; and
            tokens per expert [E].
        """
        if shared is None and self.shared_experts is not None:
            shared = self.shared(hidden_states)
        output = routed.collect()
        if self.moe_output_shape == "flat":
            output = output.reshape(-1, self.hidden_size)
        if shared is not None:
            output = output + shared.reshape(output.shape)
        return output, routed.routing.l_aux, routed.routing.exp_counts

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """As AutoEP's: [B, S, D] → the output, or (output, router logits [T, E]) where the model expects both."""
        read = hidden_states
        if self.student is not None and self.runs_converted:
            current = self.student.arrive(hidden_states)
            output, *_ = current.join(self.student.layer, hidden_states, self.student.late)
            read = current.shortcut
        else:
            recorder = SILENT if is_repeated() else self.base.recorder
            output = executor.run(self.base, hidden_states, self.base.schedule_now(), recorder).hidden
        if not self.return_router_logits:
            return output
        return output, self._logits(read.reshape(-1, self.hidden_size))

    def _logits(self, tokens_TD: Tensor) -> Tensor | None:
        """[T, E] what the model's balancing loss reads, as AutoEP returns it."""
        if self.router_logits_capture_target != "router":
            return None
        logits_TE = cast(Tensor, self.router.gate(tokens_TD))
        if self.router_logits_capture_mode != "post_score":
            return logits_TE
        score = (
            torch.sigmoid(logits_TE.float()) if self.router.score_func == "sigmoid" else logits_TE.float().softmax(1)
        )
        return score.to(logits_TE.dtype)


def autoep_layers(model: nn.Module) -> list[tuple[str, AutoEPMoELayer]]:
    """The AutoEP layers of a model, with their paths."""
    return [(name, each) for name, each in model.named_modules() if isinstance(each, AutoEPMoELayer)]


def schedule(name: str, layer: AutoEPMoELayer, wire_dtype: str | None, parts: int = 1) -> ScheduledAutoEP:
    """Changes an AutoEP layer's class, in place. Collective over the world, in the same order on all ranks.

    Args:
        parts: of each expert.

    Raises:
        ScMoEConfigError: experts that cannot be divided into so many parts.
    """
    if parts > 1:
        divide_grouped(name, layer.experts, parts)
    layer.__class__ = ScheduledAutoEP
    layer.partition = Partition(parts, layer.num_experts) if parts > 1 else None
    group = None
    if layer.ep_size > 1:
        group = travel_group(dist.get_process_group_ranks(layer.ep_group))
    layer.name, layer.wire_dtype, layer.transport = name, wire_dtype, Transport(group)
    layer.slices = TokenSlices(0 if group is None else dist.get_rank(group), 1, layer.ep_size)
    return cast(ScheduledAutoEP, layer)
