"""Pairs of Transformer blocks: a few blocks (often two), the last of which has an MoE. [B, S, D] -> `PairOutput`.

    PlainPair           DeepSpeed's own MoE or Residual MoE: the baselines, without a schedule
    ShortcutPair        ScMoE and DGMoE: the routed experts read an earlier block through the shortcut
    PipelinedPair       a top-k MoE on the current layer, which hides behind its own chunks alone (Tutel's strategy)
    SharedExpertPair    the same beside the two halves of a shared expert (Megatron-core's --moe-shared-expert-overlap)

All but the first run in the executor. A pair says which operators it has, where its shortcut is taken, and how the MoE
begins and joins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.blocks import Block
from scmoe_ds.models.layers import GPTSettings, make_norm
from scmoe_ds.models.recompute import Recompute, recompute_operator, recompute_pair
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.moe.routed import RoutedTokens
from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.overlap import executor
from scmoe_ds.overlap.executor import Activations, Operator, PairOutput, Step
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.auto import first_schedule
from scmoe_ds.planner.times import LateWindow
from scmoe_ds.trace.recorder import SILENT, PairRecorder


def tap_of(config: ScMoEConfig, position: str) -> int:
    """How many operators of a pair with a shortcut come before its tap."""
    # The tapped block's index; -1 is the block before this pair, whose output is this pair's input.
    tapped = config.moe_every - 1 - (config.shortcut_distance if config.moe_every > 1 else 1)
    # Two operators per block: Pos-1 is a block's output, Pos-2 follows its attention, Pos-3 is its input.
    return 2 * tapped + {"pos1": 2, "pos2": 1, "pos3": 0}[position]


class BlockPair(nn.Module):
    """What all pairs have in common.

    Attributes:
        config: the section that the pair follows.
        recompute: what is computed again in the backward pass instead of being kept, see models/recompute.py.
        tap: the shortcut is taken before operator number `tap`, from 0. Without a shortcut, all dense operators and the
            norm behind them come before it.
    """

    def __init__(self, blocks: Sequence[Block], config: ScMoEConfig) -> None:
        super().__init__()
        self.recompute: Recompute | None = None
        self.tap = 2 * len(blocks)
        self.blocks, self.config = blocks, config

    @property
    def last(self) -> Block:
        """The block with the MoE."""
        return self.blocks[-1]

    def steps(self) -> list[tuple[str, Step]]:
        """Kind and function of every operator, in order."""
        steps: list[tuple[str, Step]] = []
        for block in self.blocks:
            steps += [("attention", block.attend), ("mlp", block.feed)]
        return steps[:-1]

    def operators(self) -> list[Operator]:
        """All operators, in order; see `executor.Pair`."""
        steps = self.steps()
        if self.recompute == "selective":
            steps = [(kind, partial(recompute_operator, run)) for kind, run in steps]
        return executor.numbered(steps, self.tap)


class PlainPair(BlockPair):
    """The last block has a standard MoE on its own layer (architectures topk and shared_expert)."""

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> PairOutput:
        """`used_token`: [B, S], zero for tokens that go to no routed expert."""
        if self.recompute == "full" and torch.is_grad_enabled():
            return recompute_pair(partial(self._run, used_token=used_token), hidden)
        return self._run(hidden, used_token)

    def _run(self, hidden: Tensor, used_token: Tensor | None) -> PairOutput:
        activations, last = Activations(hidden), self.last
        for operator in self.operators():
            activations = operator.run(activations)
        hidden = activations.hidden
        output, l_aux, exp_counts = last.moe(last.moe_input(hidden), used_token)
        return PairOutput(last.add(hidden, output, last.mlp_norm), l_aux, exp_counts)


class StagedPair(BlockPair):
    """The last block has an MoE that runs in stages under a schedule: an `executor.Pair`.

    Attributes:
        schedule: when the routed experts run in training; replace it to run the same weights under another schedule.
        forward_schedule: the same for passes without gradients; None: as in training.
        recorder: who is told what happens when.
        joins_late: the routed output joins the stream of the next pair, or behind the last pair, on its own.
        is_last: no pair follows.
        late_window: beside which operators of the next pair its combine goes on.
    """

    late_window: LateWindow | None = None

    def __init__(
        self,
        blocks: Sequence[Block],
        settings: GPTSettings,
        config: ScMoEConfig,
        position: str,
        sequence: int,
        following: str | None,
    ) -> None:
        super().__init__(blocks, config)
        self.joins_late, self.is_last = config.join == "late", following is None
        if config.has_shortcut:
            self.tap = tap_of(config, position)
        own_norm = config.has_shortcut and config.shortcut_norm == "own"
        self.shortcut_norm = make_norm(settings) if own_norm else None
        self.post_norm = make_norm(settings) if config.post_norm else None
        late_flops = 0
        if self.joins_late and following is not None:
            # All blocks are alike, and so are their attentions.
            attention, tap_is_first = self.operators()[0].label, config.has_shortcut and tap_of(config, following) == 0
            self.late_window = LateWindow((attention,), tap_is_first)
            late_flops = self.last.attention.flops_per_token(sequence)
        self.schedule = first_schedule(config.overlap, self.backbone_flops(sequence), late_flops)
        self.forward_schedule: Schedule | None = None
        self.recorder: PairRecorder = SILENT

    def forward(self, hidden: Tensor, used_token: Tensor | None = None, late: Step | None = None) -> PairOutput:
        """
        Args:
            hidden: [B, S, D].
            used_token: [B, S], zero for tokens that go to no routed expert.
            late: of the preceding pair's output.
        """
        training = torch.is_grad_enabled()
        schedule = self.schedule if training or self.forward_schedule is None else self.forward_schedule
        if self.recompute != "full" or not training:
            return executor.run(self, hidden, schedule, self.recorder, used_token, late)
        recorders = iter([self.recorder])  # for the first pass alone: the second is nobody's forward

        def forward(hidden: Tensor) -> PairOutput:
            return executor.run(self, hidden, schedule, next(recorders, SILENT), used_token)

        return recompute_pair(forward, hidden)

    @property
    def running(self) -> StagedPair:
        """The pair that runs now: this one, or where it is not converted (models/converted.py) its base."""
        return self

    @property
    def layer(self) -> StagedMoE:
        """The MoE layer."""
        return cast(StagedMoE, self.last.moe)

    def facts(self) -> dict[str, Any]:
        """What this pair's times depend on, beside its MoE layer; JSON values."""
        parameters = {*self.parameters(), *self.layer.parameters()}
        facts = {
            "operators": [operator.label for operator in executor.backbone(self)],
            "attention_heads": list(self.last.attention.heads),
            "pre_norm": self.last.pre_norm,
            "parameters": sum(each.numel() for each in parameters),
        }
        if self.late_window is not None:
            facts["late_join"] = self.late_window.facts()
        # An operator's backward then repeats its forward.
        return {**facts, "recompute": self.recompute} if self.recompute else facts

    def begin(
        self, activations: Activations, used_token: Tensor | None, schedule: Schedule, recorder: PairRecorder
    ) -> RoutedTokens:
        return self.layer.begin(
            self._shortcut(activations, recorder),
            used_token,
            blocking=not schedule.overlap,
            num_chunks=schedule.num_chunks,
            recorder=recorder,
        )

    def join(self, routed: RoutedTokens, activations: Activations) -> PairOutput:
        hidden, moe_input = activations.hidden, activations.moe_input
        if moe_input is None:  # DGMoE has no operator that needs it
            moe_input = self.last.moe_input(hidden)
        if self.joins_late:
            parts = self.layer.finish_in_parts(routed, moe_input, activations.shared)
            known = Activations(hidden if parts.known is None else self._added(hidden, parts.known))
            late: Step = partial(self._join_late, parts.late)
            if self.is_last:
                return PairOutput(late(known).hidden, parts.l_aux, parts.exp_counts)
            return PairOutput(known.hidden, parts.l_aux, parts.exp_counts, late)
        output, l_aux, exp_counts = self.layer.finish(routed, moe_input, activations.shared)
        return PairOutput(self._added(hidden, output), l_aux, exp_counts)  # eq. 7

    def _join_late(self, late: Callable[[], Tensor], activations: Activations) -> Activations:
        return activations._replace(hidden=self._added(activations.hidden, late()))

    def _added(self, hidden: Tensor, output: Tensor) -> Tensor:
        """The residual stream with the output of the MoE, or with a part of it."""
        if self.post_norm is not None:
            output = self.post_norm(output)
        return self.last.add(hidden, output, self.last.mlp_norm)

    def backbone_flops(self, sequence: int) -> list[int]:
        """Forward floating-point operations per token of each backbone operator."""
        flops: dict[str, int] = {"norm": 0, "attention": self.last.attention.flops_per_token(sequence)}
        if hasattr(self.blocks[0], "mlp"):  # all dense blocks are alike
            flops["mlp"] = self.blocks[0].mlp.flops_per_token()
        shared = getattr(self.layer, "mlp", None)
        if shared is not None:
            flops["shared"] = shared.flops_per_token()
            flops["shared in"] = flops["shared out"] = flops["shared"] // 2
        return [flops[operator.kind] for operator in executor.backbone(self)]

    def _shortcut(self, activations: Activations, recorder: PairRecorder) -> Tensor:
        """What the routed experts read: the current layer's normalised input, unless there is a shortcut."""
        assert activations.moe_input is not None
        return activations.moe_input


class ShortcutPair(StagedPair):
    """The routed experts read an earlier block: a ScMoE (eq. 7), whose last operator is the shared expert, or DGMoE."""

    def steps(self) -> list[tuple[str, Step]]:
        return super().steps() + ([("shared", self._shared)] if isinstance(self.layer, ScMoE) else [])

    def _shared(self, activations: Activations) -> Activations:
        moe_input = self.last.moe_input(activations.hidden)
        return activations._replace(moe_input=moe_input, shared=self.layer.shared(moe_input))

    def _shortcut(self, activations: Activations, recorder: PairRecorder) -> Tensor:
        (hidden,) = recorder.open("shortcut norm", activations.hidden)
        (shortcut,) = recorder.close("shortcut norm", self._normalise_shortcut(hidden))
        return shortcut

    def _normalise_shortcut(self, hidden: Tensor) -> Tensor:
        """The tapped value through the shortcut's own norm, or as the operator after the tap reads it (LongCat)."""
        if self.shortcut_norm is not None:
            return self.shortcut_norm(hidden)
        block = self.blocks[self.tap // 2]
        return block.reading(hidden, block.mlp_norm if self.tap % 2 else block.attention_norm)


class PipelinedPair(StagedPair):
    """The routed experts read the current block, behind its norm: the backbone is empty."""

    def steps(self) -> list[tuple[str, Step]]:
        return [*super().steps(), ("norm", self._normalise)]

    def _normalise(self, activations: Activations) -> Activations:
        return activations._replace(moe_input=self.last.moe_input(activations.hidden))


class SharedExpertPair(PipelinedPair):
    """The same, and the two halves of the shared expert are the backbone."""

    def steps(self) -> list[tuple[str, Step]]:
        return [*super().steps(), ("shared in", self._shared_in), ("shared out", self._shared_out)]

    def _shared_in(self, activations: Activations) -> Activations:
        mlp = self.layer.mlp
        return activations._replace(shared_inner=mlp.activate(mlp.input(activations.moe_input)))

    def _shared_out(self, activations: Activations) -> Activations:
        return activations._replace(shared=self.layer.mlp.output(activations.shared_inner), shared_inner=None)
