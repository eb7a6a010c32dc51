"""What the log says of a replacement: which layers became what, and where they tap and join."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from scmoe_ds.planner.schedule_text import names_text
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.layer import HookedScMoE


def describe_replacement(model: nn.Module, layers: Sequence[HookedScMoE], of_all: str = "") -> list[str]:
    """Which layers of a model were replaced, by what, where they tap and join; two lines for layers of one kind.

    Args:
        layers: those that came into the model.
        of_all: what was replaced, if not MoE layers, and of how many.
    """
    kinds: dict[tuple[str, str], list[HookedPair]] = {}
    for layer in layers:
        assert layer.pair is not None
        kinds.setdefault((_sizes(layer), _side(layer.pair)), []).append(layer.pair)
    lines = []
    for (sizes, side), alike in kinds.items():
        names, taps = names_text([pair.name for pair in alike]), names_text([pair.tap.module_name for pair in alike])
        joins = names_text([pair.name if pair.late is None else pair.late.place for pair in alike])
        what = of_all or f"MoE layer{'s' * (len(alike) > 1)}"
        lines += [
            f"replaced {len(alike)} {what} of {type(model).__name__} by ScMoE: {names} ({sizes})",
            f"  tap: the {side.format(taps)}; join: the output of {joins}",
        ]
    return lines


def _sizes(layer: HookedScMoE) -> str:
    former, top_k = layer.replaced
    k = layer.deepspeed_moe.gate.k
    before = f", was top-{top_k}" if top_k != k else ""
    shared = "its" if former.use_residual else "a new"
    return f"top-{k} of {layer.num_experts} experts{before}; {shared} shared expert; merge {layer.merge}"


def _side(pair: HookedPair) -> str:
    how = "without a norm"
    if pair.norm is not None:
        kind = type(pair.norm).__name__
        how = (
            f"through the backbone's norm ({kind})" if pair.norm is pair.tap.norm else f"through its own norm ({kind})"
        )
    return f"{pair.tap.side} of {{}}, {how}"
