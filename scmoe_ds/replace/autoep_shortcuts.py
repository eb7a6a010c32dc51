"""ScMoE on AutoEP's layers: their routed experts read a preceding block's representation, through hooks.

Nothing is added to the model. Its function changes, so that it has to be trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.planner.schedule_text import names_text
from scmoe_ds.replace.first_pass import FirstPass
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.late_join import join_late
from scmoe_ds.replace.taps import Tap, find_tap, reads_raw_stream


def connect_shortcuts(model: nn.Module, found: Sequence[tuple[str, Any]], section: ScMoEConfig) -> list[str]:
    """Gives every layer a `HookedPair`, before the first forward pass.

    Args:
        model: holds the layers.
        found: path and `replace.autoep.ScheduledAutoEP`, in the order of the blocks.
        section: its position, tap and overlap.

    Returns:
        what the log says of it.

    Raises:
        ScMoEConfigError: no such place for a tap.
    """
    taps = [_tap(model, index, name, dict(found), section) for index, (name, _) in enumerate(found)]
    pairs = [
        HookedPair(name, layer, tap, tap.norm, section.overlap) for (name, layer), tap in zip(found, taps, strict=True)
    ]
    first_pass = FirstPass(pairs)
    for (_, layer), pair in zip(found, pairs, strict=True):
        layer.pair, pair.first_pass = pair, first_pass
    if section.join == "late":
        join_late(model, pairs)
    places = names_text([tap.module_name for tap in taps])
    norms = names_text([tap.norm_name for tap in taps if tap.norm_name]) or "no norm"
    late = ", and their output joins behind the next attention" if section.join == "late" else ""
    text = f"shortcuts: the routed experts read the input of {places} through {norms}{late}"
    return [f"{text}; this changes the model's function"]


def _tap(model: nn.Module, index: int, name: str, layers: dict[str, Any], section: ScMoEConfig) -> Tap:
    position = (section.first_layer_position if index == 0 else None) or section.position
    tap = find_tap(model, name, position, section)
    if tap.is_users:
        return tap
    block_name, block = tap.blocks[0]
    if reads_raw_stream(block) is not None:
        raise ScMoEConfigError(
            f'scmoe.architecture = "scmoe": {block_name} ({type(block).__name__}) normalises behind its branches; '
            'a shortcut wants a pre-norm model, use "as_is"'
        )
    if position != "pos1" and any(other.startswith(f"{block_name}.") for other in layers):
        raise ScMoEConfigError(
            f'scmoe.position = "{position}": the block before {name} has an MoE itself, {block_name}, and no dense MLP '
            'to run beside the exchange; use "pos1", and first_layer_position for a layer behind a dense block'
        )
    return tap
