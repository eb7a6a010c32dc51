"""ScMoE on AutoEP's layers: their routed experts read a preceding block's representation, through hooks.

The model's function changes, so that it has to be trained. A layer that is not converted runs as the model has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.planner.schedule_text import layers_text, names_text
from scmoe_ds.replace.adapted_parts import check_parts
from scmoe_ds.replace.converted import ConvertedLayer
from scmoe_ds.replace.first_pass import FirstPass
from scmoe_ds.replace.hooked import HookedPair
from scmoe_ds.replace.late_join import join_late
from scmoe_ds.replace.modeling_adapted import ShortcutParts, balance_for
from scmoe_ds.replace.taps import Tap, block_of, find_tap, reads_raw_stream


def connect_shortcuts(
    model: nn.Module, layers: Mapping[int, tuple[str, Any]], section: ScMoEConfig, every: list[str]
) -> list[str]:
    """Gives layers a `HookedPair` as their student and converts them, before the first forward pass.

    Args:
        model: holds the layers.
        layers: number of an MoE layer, from 0 over the model, to its path and `replace.autoep.ScheduledAutoEP`; in the
            order of the blocks.
        section: what a ScMoE is.
        every: paths of all MoE layers.

    Returns:
        what the log says of it.

    Raises:
        ScMoEConfigError: no such place for a tap, a part that is missing, or more experts per token than the model has.
    """
    taps = {number: _tap(model, number, name, every, section) for number, (name, _) in layers.items()}
    pairs = [_pair(model, name, layer, taps[number], section) for number, (name, layer) in layers.items()]
    first_pass = FirstPass(dict(zip(layers, pairs, strict=True)))
    for (_, layer), pair in zip(layers.values(), pairs, strict=True):
        layer.student, layer.converted, pair.first_pass = pair, True, first_pass
    if section.join == "late":
        join_late(model, pairs)
    if "top_k" in section.written:
        balance_for(model, section.top_k)
    return [_text(pairs, list(layers), section, len(every))]


def _pair(model: nn.Module, name: str, layer: Any, tap: Tap, section: ScMoEConfig) -> HookedPair:
    found = getattr(block_of(model, name), "shortcut", None)
    parts = found if isinstance(found, ShortcutParts) else None
    check_parts(name, parts, section, layer.shared_experts is not None)
    top_k = section.top_k if "top_k" in section.written else layer.top_k
    if top_k > layer.top_k:
        raise fail("scmoe.top_k", top_k, f"{name} routes a token to {layer.top_k} experts; use at most as many")
    norm = tap.norm if parts is None or parts.norm is None else parts.norm
    return HookedPair(name, ConvertedLayer(layer, parts, section.merge, top_k), tap, norm, section.overlap)


def _text(pairs: list[HookedPair], numbers: list[int], section: ScMoEConfig, count: int) -> str:
    """Which layers are converted, and into what, in one line."""
    named = f"MoE layer{'s' * (len(pairs) > 1)} {layers_text(numbers)}"
    which = "" if len(pairs) == count else f" of {named} (the other layers are as they were)"
    places = names_text([pair.tap.module_name for pair in pairs])
    own = section.shortcut_norm == "own"
    norms = names_text([pair.tap.norm_name for pair in pairs if pair.tap.norm_name]) or "no norm"
    late = ", and their output joins behind the next attention" if section.join == "late" else ""
    merge = f"; merge {section.merge}" if section.merge != "add" else ""
    fewer = f"; top-{section.top_k}" if "top_k" in section.written else ""
    return (
        f"shortcuts: the routed experts{which} read the input of {places} through "
        f"{'norms of their own' if own else norms}{late}{merge}{fewer}; this changes the model's function"
    )


def _tap(model: nn.Module, number: int, name: str, every: list[str], section: ScMoEConfig) -> Tap:
    position = (section.first_layer_position if number == 0 else None) or section.position
    tap = find_tap(model, name, position, section)
    if tap.is_users:
        return tap
    block_name, block = tap.blocks[0]
    if reads_raw_stream(block) is not None:
        raise ScMoEConfigError(
            f'scmoe.architecture = "scmoe": {block_name} ({type(block).__name__}) normalises behind its branches; '
            'a shortcut wants a pre-norm model, use "as_is"'
        )
    if position != "pos1" and any(other.startswith(f"{block_name}.") for other in every):
        raise ScMoEConfigError(
            f'scmoe.position = "{position}": the block before {name} has an MoE itself, {block_name}, and no dense MLP '
            'to run beside the exchange; use "pos1", and first_layer_position for a layer behind a dense block'
        )
    return tap
