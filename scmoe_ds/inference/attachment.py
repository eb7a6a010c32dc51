"""Decisions about the routed experts of a loaded model: which go together, and how one is taken off again.

A MoE layer has three places for them: a routing rule, an early rule, and its experts (moe/early.py). Two decisions go
together if they take different places. `DECISIONS` says which ones each takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from scmoe_ds.errors import ArgumentError
from scmoe_ds.moe.decisions.copied import CopiedExperts
from scmoe_ds.moe.decisions.dropping import DropRule
from scmoe_ds.moe.decisions.halves import Halves
from scmoe_ds.moe.decisions.load_aware import LoadAwareRule
from scmoe_ds.moe.decisions.low_precision import LowPrecisionExperts
from scmoe_ds.moe.decisions.partition import parts_of, whole_experts
from scmoe_ds.moe.experts import MovingExperts, OwnExperts
from scmoe_ds.moe.layer import StagedMoE

Place = tuple[Any, str, Any]
"""An object, one of its attributes, and what a decision has there."""
ROUTING, EARLY, EXPERTS = "the routing rule", "the early rule", "the experts"


@dataclass(frozen=True)
class Decision:
    """
    Attributes:
        name: in sentences and in the table of docs/inference.md.
        kinds: classes of which a layer then has an object.
        takes: places of a layer.
        without: how a user leaves it out.
        ranks: more than one expert-parallel rank is needed: it compares their loads.
        own_tokens: tensor-parallel size 1 is needed: each rank decides for its own tokens.
    """

    name: str
    kinds: tuple[type, ...]
    takes: tuple[str, ...]
    without: str
    ranks: bool = False
    own_tokens: bool = False


DROPS = Decision("drops", (DropRule, LoadAwareRule), (ROUTING,), "add --no-drop")
HALVES = Decision("halves of experts", (Halves,), (EXPERTS,), "add --no-drop, or --drop-method 1t")
LOAD_AWARE = Decision("load-aware drops", (LoadAwareRule,), (EARLY,), "leave --drop-load-aware out", True, True)
LOW_PRECISION = Decision("low precision", (LowPrecisionExperts,), (EXPERTS,), "leave --low-precision out")
COPIES = Decision(
    "copies of experts", (CopiedExperts,), (ROUTING, EARLY, EXPERTS), "leave --expert-copies out", True, True
)
LOADS = replace(
    COPIES, name="counts of experts' loads", without="leave --save-expert-loads out", ranks=False
)  # `CopiedExperts` without a copy
OFFLOADED = Decision("offloaded experts", (MovingExperts,), (EXPERTS,), "use --experts resident")
DECISIONS = (DROPS, HALVES, LOAD_AWARE, LOW_PRECISION, COPIES, OFFLOADED)


def moe_layers(model: nn.Module) -> dict[str, Any]:
    """The MoE layers of a model that have two or more experts, in its order, by name: `StagedMoE` of this package's
    models, `ScheduledAutoEP` of Hugging Face's under `scmoe_ds.initialize`."""
    from scmoe_ds.replace.autoep import ScheduledAutoEP  # imports transformers' side of DeepSpeed

    kinds = (StagedMoE, ScheduledAutoEP)
    return {name: each for name, each in model.named_modules() if isinstance(each, kinds) and whole_experts(each) > 1}


def place_of_experts(layer: Any) -> tuple[Any, str]:
    """The object and its attribute that hold a layer's experts; None there: AutoEP's own."""
    return (layer.deepspeed_moe, "experts") if isinstance(layer, StagedMoE) else (layer, "own_experts")


def attached_to(layer: Any) -> list[Decision]:
    """What a layer has, whoever attached it."""
    experts = getattr(*place_of_experts(layer))
    held = {ROUTING: layer.routing_rule, EARLY: layer.early_rule, EXPERTS: experts}
    if not isinstance(experts, OwnExperts):
        del held[EXPERTS]
    found = []
    for place, each in held.items():
        if each is not None:
            known = [decision for decision in DECISIONS if isinstance(each, decision.kinds)]
            found += known or [Decision(type(each).__name__, (), (place,), "take that off")]
    return found


def check(layers: Sequence[Any], wanted: Sequence[Decision], what: str) -> None:
    """
    Args:
        layers: of `moe_layers`.
        wanted: of one call.
        what: a user asks for, for the error.

    Raises:
        ArgumentError: layers or ranks for which a decision does not hold, or another decision in its place.
    """
    for other in (each for layer in layers for each in attached_to(layer)):
        for own in wanted:
            check_together(own, other, what)
    if any(layer.dispatch != "exact" for layer in layers):
        raise ArgumentError(f'{what}: scmoe.dispatch = "padded" sends whole buffers, without row counts; use "exact"')
    slices = [layer.slices for layer in layers]
    if any(each.ranks for each in wanted) and any(each.expert_parallel_size == 1 for each in slices):
        raise ArgumentError(
            f"{what}: one rank has all experts, so there are no loads to compare; start more ranks with "
            "--moe-expert-parallel-size, or leave the flag out"
        )
    if any(each.own_tokens for each in wanted) and any(each.tensor_parallel_size > 1 for each in slices):
        raise ArgumentError(
            f"{what}: tensor-parallel ranks hold the same tokens, for which no rank alone can decide; use "
            "--tensor-model-parallel-size 1, or leave the flag out"
        )
    if not (changing := [each for each in wanted if EXPERTS in each.takes]):
        return
    remedies = " or ".join(each.without for each in changing)
    if any(parts_of(layer) > 1 for layer in layers if not isinstance(layer, StagedMoE)):
        raise ArgumentError(
            f"{what}: parts of AutoEP's experts compute whole; leave scmoe.expert_partition out, or {remedies}"
        )
    if any(getattr(layer, "enable_expert_tensor_parallelism", False) for layer in layers):
        raise ArgumentError(
            f"{what}: each rank has a part of every expert only; leave --enable-expert-tensor-parallelism out, or "
            f"{remedies}"
        )


def check_together(own: Decision, other: Decision, what: str) -> None:
    """Raises an ArgumentError for two decisions that do not go together; `what` as for `check`."""
    if shared := [place for place in own.takes if place in other.takes]:
        raise ArgumentError(
            f"{what}: does not go with {other.name}, as both change {' and '.join(shared)} of a layer; "
            f"{other.without}, or {own.without}"
        )


class Attachment:
    """What a decision has put into its places, and what was there before.

    Args:
        places: of all layers.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = [(owner, name, value, getattr(owner, name)) for owner, name, value in places]
        self.attach()

    def attach(self) -> None:
        """Puts it there again.

        Raises:
            ArgumentError: something else was put into one of its places meanwhile.
        """
        for owner, name, value, before in self._places:
            held = getattr(owner, name)
            if held is not value and held is not before:
                raise ArgumentError(
                    f"attach(): {name} of a {type(owner).__name__} was changed meanwhile; take that off first"
                )
        for owner, name, value, _ in self._places:
            setattr(owner, name, value)

    def detach(self) -> None:
        """The layers are as they were before it."""
        for owner, name, _, before in self._places:
            setattr(owner, name, before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Takes it off meanwhile."""
        self.detach()
        try:
            yield
        finally:
            self.attach()
