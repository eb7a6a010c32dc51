"""The work of a pair: which of its operators come before the tap, which between tap and join."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scmoe_ds.simulate import operators_deepspeed as deepspeed
from scmoe_ds.simulate import operators_moe as own
from scmoe_ds.simulate.ground import Ground
from scmoe_ds.simulate.operators import Cost, activation, all_reduce, norm, product
from scmoe_ds.simulate.operators_dense import attention, feed_forward, mlp, shared_gate
from scmoe_ds.simulate.operators_swin import patch_merging, window_attention, window_mlp
from scmoe_ds.simulate.parameters import dense_block, merging_parameters, moe_block
from scmoe_ds.simulate.work import Exchange, PairWork, Parameters, Reduced, Work

_COUNTS = 8
"""Bytes of a row count that travels."""
_TAPS = {"pos1": 2, "pos2": 1, "pos3": 0}


@dataclass(frozen=True)
class Block:
    """A block of the model.

    Attributes:
        number: of its stage.
        moe: whether it has an MoE.
        before: of the stage before, where patches are merged on the way to this block.
        shifted: whether a Swin's windows are shifted.
    """

    ground: Ground
    number: int
    moe: bool
    before: Ground | None = None
    shifted: bool = False

    @property
    def key(self) -> tuple[int, bool, bool, bool]:
        """Blocks of a model that are alike have the same."""
        return self.number, self.moe, self.before is not None, self.shifted

    def steps(self) -> list[tuple[str, Cost]]:
        """Its dense operators, in order."""
        merging = patch_merging(self.before, self.ground) if self.before else Cost()
        if self.ground.model.images:
            first = merging + window_attention(self.ground, self.shifted)
            return [("attention", first)] + ([] if self.moe else [("mlp", window_mlp(self.ground))])
        return [("attention", attention(self.ground))] + ([] if self.moe else [("mlp", mlp(self.ground))])

    def parameters(self) -> Parameters:
        merging = merging_parameters(self.before.stage, self.ground.stage) if self.before else 0
        if not self.moe:
            return Parameters(dense_block(self.ground) + merging)
        of_block = moe_block(self.ground)
        return Parameters(of_block.dense + merging, of_block.experts)


def tap_of(run: Sequence[Block]) -> int:
    """How many operators of a pair come before its tap; negative: the pair has too few blocks."""
    method = run[-1].ground.method
    distance = 1 if len(run) == 1 else method.shortcut_distance
    return 2 * (len(run) - 1 - distance) + _TAPS[method.position or "pos2"]


def pair_of(run: Sequence[Block], following: Sequence[Block] | None) -> PairWork:
    """The pair that a run of blocks makes.

    Args:
        following: the next pair; None: it is the last.
    """
    ground = run[-1].ground
    steps = [step for block in run for step in block.steps()]
    before, backbone = _around_tap(run, steps)
    late, after_dispatch = _late_window(steps, before, following)
    parameters = [block.parameters() for block in run]
    full = ground.layout.recompute in ("full", True)
    pair = PairWork(
        method=ground.method,
        count=1,
        before=_labelled(before, " before tap", ground),
        gate=_work("gate", _gate(ground), ground),
        encode=_work("encode", _encode(ground), ground),
        backbone=_labelled(backbone, "", ground),
        experts=_work("experts", _experts(ground), ground),
        decode=_work("decode", _decode(ground), ground),
        exchange=_exchange(ground),
        parameters=Parameters(sum(each.dense for each in parameters), sum(each.experts for each in parameters)),
        num_experts=ground.experts.num_experts,
        late=late,
        late_after_dispatch=after_dispatch,
        repeated=full and ground.layout.training,
    )
    return _without_kept(pair, run[0].ground.row_bytes) if full else pair


def trailing(blocks: Sequence[Block]) -> tuple[Cost, float]:
    """Blocks behind the last MoE, as one cost, and their parameters."""
    cost, parameters = Cost(), 0.0
    for block in blocks:
        parameters += block.parameters().dense
        for _, step in block.steps():
            cost += step
    return cost, parameters


def _around_tap(
    run: Sequence[Block], steps: list[tuple[str, Cost]]
) -> tuple[list[tuple[str, Cost]], list[tuple[str, Cost]]]:
    """Operators before the tap and behind it; without a shortcut the MoE's norm is the last one before."""
    ground = run[-1].ground
    if ground.method.architecture == "scmoe":
        tap = tap_of(run)
        shared = [("shared", _input_norm(ground) + _shared(ground))] if ground.shared_hidden else []
        return steps[:tap], steps[tap:] + shared
    before = steps if ground.model.images else [*steps, ("norm", _input_norm(ground))]
    if ground.method.architecture == "topk":
        # The model's own shared expert: beside the exchange here, behind the combine in DeepSpeed's layers.
        beside = ground.shared_hidden and ground.method.layer == "scmoe_ds"
        return before, [("shared", _shared(ground))] if beside else []
    return before, _halves(ground) if ground.shared_hidden else []


def _input_norm(ground: Ground) -> Cost:
    if ground.model.images:
        return Cost()
    return norm(ground.rows, ground.stage.hidden, ground.width, ground.rms)


def _shared(ground: Ground) -> Cost:
    return feed_forward(ground, ground.shared_hidden) + shared_gate(ground)


def _halves(ground: Ground) -> list[tuple[str, Cost]]:
    """A shared expert's projections, the activation with the first."""
    stage, rows, width = ground.stage, ground.rows, ground.width
    inner = ground.shared_hidden / ground.tp
    first = (
        all_reduce(ground.row_bytes, ground.tp, forward=False)
        + product(rows, stage.hidden, inner * (2 if stage.gated else 1), width, stage.bias)
        + activation(rows, inner, width, stage.gated)
        + Cost(kept=rows * inner * width if stage.gated else 0.0)
    )
    second = product(rows, inner, stage.hidden, width, stage.bias) + all_reduce(ground.row_bytes, ground.tp, True)
    return [("shared in", first), ("shared out", second + shared_gate(ground))]


def _gate(ground: Ground) -> Cost:
    if ground.method.layer == "deepspeed":
        return deepspeed.padded_gate(ground)
    if ground.method.layer == "autoep":
        return deepspeed.sorted_gate(ground)
    shortcut = ground.method.architecture == "scmoe" and ground.method.shortcut_norm == "own"
    return own.gate(ground, shortcut)


def _encode(ground: Ground) -> Cost:
    layer = ground.method.layer
    if layer == "deepspeed":
        return deepspeed.padded_encode(ground)
    return deepspeed.sorted_encode(ground) if layer == "autoep" else own.encode(ground)


def _experts(ground: Ground) -> Cost:
    layer = ground.method.layer
    received = ground.sent
    if layer == "deepspeed":
        # With divided experts, tensor-parallel ranks gather their slices again.
        return deepspeed.padded_experts(ground, ground.sent)
    return deepspeed.sorted_experts(ground, received) if layer == "autoep" else own.experts(ground, received)


def _decode(ground: Ground) -> Cost:
    layer, behind = ground.method.layer, Cost()
    if ground.method.architecture == "topk" and ground.shared_hidden and layer != "scmoe_ds":
        behind = _shared(ground)
    if layer == "deepspeed":
        return behind + deepspeed.padded_decode(ground)
    if layer == "autoep":
        return behind + deepspeed.sorted_decode(ground)
    gathered = Cost()
    if ground.layout.expert_parallel == 1 and ground.slices > 1:
        rows = Reduced("all-gather", "tp", ground.sent * ground.slices * ground.stage.hidden * ground.width)
        gathered = Cost((rows,), (rows,))
    return behind + gathered + own.decode(ground)


def _exchange(ground: Ground) -> Exchange | None:
    if ground.layout.expert_parallel == 1:
        return None
    padded = ground.method.dispatch == "padded"
    whole = ground.slices > 1 and ground.method.layer == "scmoe_ds"
    return Exchange(
        rows=ground.sent,
        choices=ground.routed if ground.one_row_per_rank else 1,
        parts=ground.method.parts if ground.one_row_per_rank else 1,
        row_bytes=float(ground.stage.hidden * ground.width),
        padded=padded,
        count_bytes=_counted(ground),
        combine_rows=ground.sent * ground.slices if whole else 0.0,
    )


def _late_window(
    steps: list[tuple[str, Cost]], before: list[tuple[str, Cost]], following: Sequence[Block] | None
) -> tuple[tuple[str, ...], bool]:
    """Beside which operators of the next pair the combine goes on: its first attention."""
    if following is None or following[-1].ground.method.join != "late":
        return (), False
    shortcut = following[-1].ground.method.architecture == "scmoe"
    tap_is_first = shortcut and tap_of(following) == 0
    return ("attention" if tap_is_first else "attention before tap",), tap_is_first


def _labelled(steps: Sequence[tuple[str, Cost]], side: str, ground: Ground) -> tuple[Work, ...]:
    """With the planner's labels: "attention before tap", "mlp 2"."""
    seen: Counter[str] = Counter()
    works = []
    for kind, cost in steps:
        seen[kind] += 1
        number = f" {seen[kind]}" if seen[kind] > 1 else ""
        if ground.layout.recompute == "selective":
            cost = cost.repeated(ground.row_bytes)
        works.append(_work(f"{kind}{side}{number}", cost, ground))
    return tuple(works)


def _work(name: str, cost: Cost, ground: Ground) -> Work:
    return (cost if ground.layout.training else cost.without_backward()).named(name)


def _without_kept(pair: PairWork, kept: float) -> PairWork:
    """Of a pair that keeps its input alone."""
    parts = {name: replace(getattr(pair, name), kept=0.0) for name in ("gate", "encode", "experts", "decode")}
    before = tuple(replace(work, kept=0.0) for work in pair.before)
    backbone = tuple(replace(work, kept=0.0) for work in pair.backbone)
    parts["gate"] = replace(parts["gate"], kept=kept)
    return replace(pair, before=before, backbone=backbone, **parts)


def _counted(ground: Ground) -> float:
    """Bytes that ranks agree on ahead of an exchange: rows of every expert, or this package's capacity with padding."""
    if ground.method.dispatch == "exact":
        return float(ground.places * _COUNTS)
    return 0.0 if ground.method.layer == "deepspeed" else float(_COUNTS)
