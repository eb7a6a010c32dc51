"""What converting an MoE layer saves, by the planner's simulation from measured operator times. No torch, no model.

Both pairs are planned by the same planner: as the source has it, with the overlap that its own shared experts and
chunks allow, and as a ScMoE. Both are simulated over the same operators, from the tap to the join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scmoe_ds.analysis.feasibility import Times, timed_backbone
from scmoe_ds.config.names import Join, Position
from scmoe_ds.planner.calibration_file import Description
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.simulation import Simulated, total_ms
from scmoe_ds.planner.times import SHARED, ChunkTimes, LateTimes, OperatorTime, OperatorTimes, PassTimes


@dataclass(frozen=True)
class Way:
    """How layers are converted: where the shortcut is taken (of the first MoE layer, if it has another position), and
    where the routed output is added. The names are those of the "scmoe" section."""

    position: Position
    join: Join
    first_layer_position: Position | None = None

    def at(self, layer: int) -> Position:
        """Of an MoE layer."""
        return (self.first_layer_position if layer == 0 else None) or self.position

    @property
    def text(self) -> str:
        """For tables."""
        first = "" if self.first_layer_position is None else f", layer 0 Pos-{self.first_layer_position[-1]}"
        return f"Pos-{self.position[-1]}{first}" + (", late join" if self.join == "late" else "")


@dataclass(frozen=True)
class Shape:
    """What the times of a model's pairs depend on beside the measured ones.

    Attributes:
        experts: routed experts of each MoE layer.
        moe_every, distance: blocks of a pair; blocks between tap and MoE.
        top_k: of the source and of the ScMoE.
        shared: whether the source has a shared expert, and whether the ScMoE has one.
    """

    experts: Sequence[int]
    moe_every: int
    distance: int
    top_k: tuple[int, int]
    shared: tuple[bool, bool]

    def operators(self, position: Position, shared: bool) -> list[str]:
        """Kinds of the operators from the tap to the join, in order."""
        before = {"pos1": [], "pos2": ["mlp"], "pos3": ["attention", "mlp"]}[position]
        between = ["attention", "mlp"] * ((self.distance if self.moe_every > 1 else 1) - 1)
        return [*before, *between, "attention", *(["shared"] if shared else [])]


@dataclass(frozen=True)
class LayerTime:
    """A training pass, forward and backward, of one micro-batch through a layer's pair, from tap to join.

    Attributes:
        before: as the source has it.
        after: as a ScMoE, where the following MoE layer is converted, too.
    """

    before: Simulated
    after: Simulated

    @property
    def saved_ms(self) -> float:
        """Negative if the ScMoE is slower, as with a shared expert that the source does not compute."""
        return self.before.total_ms - self.after.total_ms


def layer_time(times: Times, shape: Shape, way: Way, layer: int) -> LayerTime | str:
    """The times of a layer, before and after.

    Returns:
        a text with what was not timed, if an operator of the pair was not.
    """
    description, measured = _kind_of(times, shape.experts[layer])
    scale = [k / int(description.get("top_k", 1)) for k in shape.top_k]
    position = way.at(layer)
    after_kinds, before_kinds = (shape.operators(position, shared) for shared in shape.shared[::-1])
    backbone, missing = timed_backbone(after_kinds, measured)
    plain, also_missing = timed_backbone(before_kinds, measured)
    if backbone is None or plain is None:
        return missing if backbone is None else also_missing
    late = None
    if way.join == "late" and layer + 1 < len(shape.experts):
        attention = next(each for each, kind in zip(backbone, after_kinds, strict=True) if kind == "attention")
        late = LateTimes(operators=(attention,), after_dispatch=way.at(layer + 1) == "pos3" or shape.moe_every == 1)
    after = plan(_with(measured, backbone, late, scale[1]), "train").predicted
    return LayerTime(_before(measured, plain, late, scale[0]), after)


def _before(
    measured: OperatorTimes, backbone: Sequence[OperatorTime], late: LateTimes | None, scale: float
) -> Simulated:
    """The source's pair: its MoE reads the current layer, so that only its shared expert runs beside the exchange."""
    shared = [each for each in backbone if each.kind in SHARED]
    found = plan(_with(measured, shared, None, scale), "train").predicted
    others = [each for each in backbone if each.kind not in SHARED]
    if late is not None and not late.after_dispatch:  # a periodic pair has the next one's attention as its own
        others += late.operators
    serial_ms = sum(total_ms(each, "train") for each in others)
    return Simulated(found.total_ms + serial_ms, found.exposed_ms, found.communication_ms, found.slack_ms)


def _with(
    measured: OperatorTimes, backbone: Sequence[OperatorTime], late: LateTimes | None, scale: float
) -> OperatorTimes:
    """Other operators, and as many times the routed tokens."""

    def scaled(part: PassTimes) -> PassTimes:
        return PassTimes(forward_ms=scale * part.forward_ms, backward_ms=scale * part.backward_ms)

    chunks = {
        count: ChunkTimes(dispatch=scaled(each.dispatch), experts=scaled(each.experts), combine=scaled(each.combine))
        for count, each in measured.chunks.items()
    }
    return measured.model_copy(update={"backbone": tuple(backbone), "late": late, "chunks": chunks})


def _kind_of(times: Times, experts: int) -> tuple[Description, OperatorTimes]:
    """Of layers with as many experts, the kind with the longest backbone: all blocks of a model are alike."""
    fitting = [each for each in times.kinds if each[0].get("num_experts", experts) == experts]
    return max(fitting or times.kinds, key=lambda each: len(each[1].backbone))


def hidden_share(layers: Sequence[Simulated]) -> float:
    """Share of all layers' communication that runs beside computation, 0 … 1; 1 if nothing travels."""
    communication_ms = sum(each.communication_ms for each in layers)
    return max(0.0, 1 - sum(each.exposed_ms for each in layers) / communication_ms) if communication_ms else 1.0
