"""Transformer blocks, and runs of blocks that end in one with an MoE.

A `ScheduledRun` says where its routed experts read and which operators follow: it is the executor's pair. A `PlainRun`
holds DeepSpeed's own MoE or Residual MoE and is the baseline. Both map [B, S, D] to a `PairOutput`.

No attribute here may contain the word "expert": DeepSpeed's checkpoints would take it for routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import MLP, Attention, GPTSettings, make_norm
from scmoe_ds.models.parallel_layers import Group
from scmoe_ds.models.recompute import Recompute, recompute_operator, recompute_run
from scmoe_ds.moe.build import build_moe
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.overlap import executor
from scmoe_ds.overlap.executor import Activations, Operator, PairOutput, Step
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.tensor import mark_tensor_parallel, tensor_parallel_rule
from scmoe_ds.planner.plan import slot_that_halves
from scmoe_ds.trace.recorder import SILENT, PairRecorder


class Block(nn.Module):
    """Transformer block; its second half is an MLP, or an MoE that the run drives.

    Each sub-layer f and its norm make of a hidden state x:

        pre-norm    x + s * f(norm(x))
        post-norm   norm(x + s * f(x))

    with the residual scale s. The equations of the paper leave the norms out.
    """

    def __init__(self, settings: GPTSettings, group: Group, moe: MoE | None = None, owns_moe: bool = True) -> None:
        super().__init__()
        self.dropout, self.scale = settings.hidden_dropout, settings.residual_scale
        self.pre_norm = settings.norm_placement == "pre"
        self.attention_norm = make_norm(settings)
        self.attention = Attention(settings, group)
        self.mlp_norm = make_norm(settings)
        if moe is None:
            self.mlp = MLP(settings, group)
        elif owns_moe:
            self.moe = moe
        else:  # another block's: DeepSpeed trains and saves it there, and under one name
            self.__dict__["moe"] = moe

    def attend(self, activations: Activations) -> Activations:
        """Eq. 8 and 10: H_mh = H + Attn(H)."""
        update = self.attention(self.reading(self.attention_norm, activations.hidden))
        return Activations(self.add(activations.hidden, update, self.attention_norm))

    def feed(self, activations: Activations) -> Activations:
        """Eq. 9: H_mlp = H_mh + MLP(H_mh)."""
        return Activations(self.add(activations.hidden, self.mlp(self.moe_input(activations.hidden)), self.mlp_norm))

    def moe_input(self, hidden: Tensor) -> Tensor:
        """What the second half's MLP or MoE reads of H_mh."""
        return self.reading(self.mlp_norm, hidden)

    def reading(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        """What the sub-layer of a norm reads."""
        return norm(hidden) if self.pre_norm else hidden

    def where_read(self, sub_layer: Literal["attention", "mlp"]) -> tuple[nn.Module, Literal["input", "output"]]:
        """A module and its side at which a hook finds what a sub-layer reads."""
        if self.pre_norm:
            return (self.attention_norm if sub_layer == "attention" else self.mlp_norm), "output"
        return (self.attention, "input") if sub_layer == "attention" else (self.attention_norm, "output")

    def add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        """Residual connection of the sub-layer of a norm, with dropout on the update."""
        if self.scale != 1.0:
            update = self.scale * update
        total = hidden + F.dropout(update, self.dropout, self.training)
        return total if self.pre_norm else norm(total)


def make_moe(settings: GPTSettings, config: ScMoEConfig, num_experts: int, group: Group) -> MoE:
    """The layer that `config.architecture` names; "topk" and "shared_expert" are DeepSpeed's own classes.

    The shared expert is divided among the tensor-parallel ranks; a routed expert only where the section says so.
    """
    divisible = config.expert_tensor_parallelism
    routed_mlp = MLP(settings, group if divisible else None)
    layer = build_moe(config, settings.hidden_size, routed_mlp, num_experts)
    for copied in layer.deepspeed_moe.experts.deepspeed_experts:  # copies of a parameter lose what was noted on it
        for original, parameter in zip(routed_mlp.parameters(), copied.parameters(), strict=True):
            rule = tensor_parallel_rule(original) if divisible else None
            mark_tensor_parallel(parameter, rule, divided=rule is not None and group is not None)
    if layer.use_residual and group is not None:
        layer.mlp = MLP(settings, group)  # DeepSpeed's would be of one form with the routed experts
    return layer


def make_blocks(
    settings: GPTSettings, config: ScMoEConfig, num_experts: int, group: Group, shared_moe: MoE | None = None
) -> nn.ModuleList:
    """Dense blocks and, last, one with the MoE, its own or an earlier run's; `group` are the tensor-parallel ranks."""
    dense = [Block(settings, group) for _ in range(config.moe_every - 1)]
    moe = shared_moe or make_moe(settings, config, num_experts, group)
    return nn.ModuleList([*dense, Block(settings, group, moe, owns_moe=shared_moe is None)])


class PlainRun(nn.Module):
    """Blocks of which the last holds a standard MoE on its own layer (baselines topk and shared_expert)."""

    def __init__(self, settings: GPTSettings, config: ScMoEConfig, num_experts: int, group: Group = None) -> None:
        super().__init__()
        self.blocks = make_blocks(settings, config, num_experts, group)
        self.recompute: Recompute | None = None

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> PairOutput:
        """`used_token`: [B, S], zero for tokens that go to no routed expert."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return recompute_run(partial(self._run, used_token=used_token), hidden)
        return self._run(hidden, used_token)

    def _run(self, hidden: Tensor, used_token: Tensor | None) -> PairOutput:
        blocks = cast(Sequence[Block], self.blocks)
        operators = [step for block in blocks for step in (block.attend, block.feed)][:-1]
        activations, last = Activations(hidden), blocks[-1]
        for operator in operators:
            activations = (
                recompute_operator(operator, activations) if self.recompute == "selective" else operator(activations)
            )
        output, l_aux, exp_counts = last.moe(last.moe_input(activations.hidden), used_token)
        return PairOutput(last.add(activations.hidden, output, last.mlp_norm), l_aux, exp_counts)


def tap_of(config: ScMoEConfig, position: str) -> int:
    """The number of a run's operators before the tap."""
    if not config.has_shortcut:
        return 2 * config.moe_every  # behind the norm that all operators of the last block share
    # The tapped block's index; -1 is the block before this run, whose output is this run's input.
    tapped = config.moe_every - 1 - (config.shortcut_distance if config.moe_every > 1 else 1)
    # Two operators per block: Pos-1 is a block's output, Pos-2 follows its attention, Pos-3 is its input.
    return 2 * tapped + {"pos1": 2, "pos2": 1, "pos3": 0}[position]


class ScheduledRun(nn.Module):
    """Blocks of which the last holds an MoE that runs in stages under a schedule: the executor's pair.

    A ScMoE or DGMoE reads an earlier block through the shortcut. The strong baselines read the current block: a
    pipelined top-k MoE (Tutel's strategy) has no operator to hide behind but its own chunks, an overlapped shared
    expert (as Megatron-core's --moe-shared-expert-overlap) its two halves.

    Attributes:
        schedule: when the routed experts run in training; replace it to run the same weights under another schedule.
        forward_schedule: the same where no gradient is wanted; None: as in training.
        recorder: who is told what happens when.
        recompute: what is computed again in the backward pass instead of being kept.
        tap: the shortcut is taken before operator number `tap`.
        owns_layer: False: the MoE is that of an earlier run (DGMoE-Share, paper section 4).
    """

    def __init__(
        self,
        settings: GPTSettings,
        config: ScMoEConfig,
        num_experts: int,
        position: str,
        sequence: int,
        group: Group = None,
        shared_moe: MoE | None = None,
    ) -> None:
        super().__init__()
        self.recompute: Recompute | None = None
        self.blocks = make_blocks(settings, config, num_experts, group, shared_moe)
        self.owns_layer = shared_moe is None
        self.on_current_layer = not config.has_shortcut
        self.tap = tap_of(config, position)
        own_norm = config.has_shortcut and config.shortcut_norm == "own"
        self.shortcut_norm = make_norm(settings) if own_norm else None
        self.post_norm = make_norm(settings) if config.post_norm else None
        self.schedule = self._schedule(config, sequence)
        self.forward_schedule: Schedule | None = None
        self.recorder: PairRecorder = SILENT

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> PairOutput:
        """`used_token`: [B, S], zero for tokens that go to no routed expert."""
        training = torch.is_grad_enabled()
        schedule = self.schedule if training or self.forward_schedule is None else self.forward_schedule
        if self.recompute != "full" or not training:
            return executor.run(self, hidden, schedule, self.recorder, used_token)
        recorders = iter([self.recorder])  # for the first pass alone: the second is nobody's forward

        def forward(hidden: Tensor) -> PairOutput:
            return executor.run(self, hidden, schedule, next(recorders, SILENT), used_token)

        return recompute_run(forward, hidden)

    def operators(self) -> list[Operator]:
        """All operators of the run, in order; see `executor.Pair`."""
        steps = self._steps()
        if self.recompute == "selective":
            steps = [(kind, partial(recompute_operator, run)) for kind, run in steps]
        return executor.numbered(steps, self.tap)

    def _steps(self) -> list[tuple[str, Step]]:
        steps: list[tuple[str, Step]] = []
        for block in cast(Sequence[Block], self.blocks):
            steps += [("attention", block.attend), ("mlp", block.feed)]
        del steps[-1]
        has_shared = isinstance(self._last.moe, ScMoE)
        if self.on_current_layer:
            steps.append(("norm", self._normalise))
            return steps + ([("shared in", self._shared_in), ("shared out", self._shared_out)] if has_shared else [])
        return steps + ([("shared", self._shared)] if has_shared else [])

    @property
    def layer(self) -> StagedMoE:
        """The MoE layer."""
        return self._last.moe

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks between which rows travel."""
        return self.layer.transport.group

    def facts(self) -> dict[str, Any]:
        """What this run's times depend on, beside its MoE layer; JSON values."""
        parameters = {*self.parameters(), *self.layer.parameters()}
        facts = {
            "operators": [operator.label for operator in self.backbone()],
            "attention_heads": list(self._last.attention.heads),
            "pre_norm": self._last.pre_norm,
            "parameters": sum(each.numel() for each in parameters),
        }
        # An operator's backward then repeats its forward.
        return {**facts, "recompute": self.recompute} if self.recompute else facts

    def backbone(self) -> list[Operator]:
        """The operators between shortcut and join."""
        return executor.backbone(self)

    def begin(
        self, activations: Activations, used_token: Tensor | None, schedule: Schedule, recorder: PairRecorder
    ) -> RoutedTokens:
        shortcut = activations.moe_input
        if shortcut is None:
            (hidden,) = recorder.open("shortcut norm", activations.hidden)
            (shortcut,) = recorder.close("shortcut norm", self._read_shortcut(hidden))
        return self._last.moe.begin(
            shortcut, used_token, blocking=not schedule.overlap, num_chunks=schedule.num_chunks, recorder=recorder
        )

    def join(self, routed: executor.Routed, activations: Activations) -> PairOutput:
        last = self._last
        moe_input = last.moe_input(activations.hidden) if activations.moe_input is None else activations.moe_input
        layer = self._last.moe
        output, l_aux, exp_counts = layer.finish(routed, moe_input, activations.shared)
        if self.post_norm is not None:
            output = self.post_norm(output)
        return PairOutput(last.add(activations.hidden, output, last.mlp_norm), l_aux, exp_counts)  # eq. 7

    def backbone_flops(self, sequence: int) -> list[int]:
        """Forward floating-point operations per token of each backbone operator."""
        flops: dict[str, int] = {"norm": 0}
        for block in cast(Sequence[Block], self.blocks):  # all blocks are alike
            mlp = block.mlp if hasattr(block, "mlp") else getattr(block.moe, "mlp", None)
            flops["attention"] = block.attention.flops_per_token(sequence)
            if mlp is not None:
                flops["mlp"] = flops["shared"] = mlp.flops_per_token()
                flops["shared in"] = flops["shared out"] = flops["mlp"] // 2
        return [flops[operator.kind] for operator in self.backbone()]

    @property
    def _last(self) -> Block:
        return cast(Block, self.blocks[-1])

    def _normalise(self, activations: Activations) -> Activations:
        return Activations(activations.hidden, self._last.moe_input(activations.hidden))

    def _shared(self, activations: Activations) -> Activations:
        moe_input = self._last.moe_input(activations.hidden)
        return Activations(activations.hidden, moe_input, self._last.moe.shared(moe_input))

    def _shared_in(self, activations: Activations) -> Activations:
        mlp = self._last.moe.mlp
        return activations._replace(shared_inner=mlp.activate(mlp.input(activations.moe_input)))

    def _shared_out(self, activations: Activations) -> Activations:
        return activations._replace(shared=self._last.moe.mlp.output(activations.shared_inner), shared_inner=None)

    def _read_shortcut(self, hidden: Tensor) -> Tensor:
        """The tapped value through the shortcut's own norm, or as the operator after the tap reads it (LongCat)."""
        if self.shortcut_norm is not None:
            return self.shortcut_norm(hidden)
        block = cast(Block, self.blocks[self.tap // 2])
        return block.reading(block.mlp_norm if self.tap % 2 else block.attention_norm, hidden)

    def _schedule(self, config: ScMoEConfig, sequence: int) -> Schedule:
        overlap = config.overlap
        slot = overlap.expert_slot
        if slot == "auto":
            slot = slot_that_halves(self.backbone_flops(sequence))
        slots = tuple(slot) if isinstance(slot, list) else slot
        chunks = overlap.num_chunks
        if chunks == "auto":
            chunks = len(slots) if isinstance(slots, tuple) else 1
        return Schedule(slots, chunks, overlap.enabled)
