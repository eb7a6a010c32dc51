"""Where a model's preceding-layer representation can be picked up: modules and sides, found by their names.

A block is the nearest ancestor of the MoE that is a member of an nn.ModuleList. Paper section 3: Pos-1 is the input of
the block that holds the MoE, Pos-3 that of the block before it, Pos-2 that block's value between attention and MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from scmoe_ds.config import ScMoEConfig, ScMoEConfigError

Side = Literal["input", "output"]

POST_ATTENTION_NORMS = ("ln_2", "post_attention_layernorm", "layernorm_after", "pre_mlp_layernorm", "mlp_norm", "norm2",
                        "ln")  # fmt: skip
"""GPT-2; LLaMA, Mistral, Qwen, GPT-NeoX, Megatron; ViT, Swin; megatron-core; this package; timm; MegatronBert."""
INPUT_NORMS = ("ln_1", "input_layernorm", "layernorm_before", "attention_norm", "norm1", "attention.ln")
"""The norms through which the same models' attention reads a block's input."""
RES_POST_NORM_BLOCKS = {"Swinv2Layer": "intermediate"}
"""Classes whose norms end the branches: attention and the feed-forward of this name read the raw residual stream."""
POST_NORMS = ("attention.output.LayerNorm",)
"""BERT, RoBERTa: norms behind the residual sum, so that there is no unnormalised stream to tap."""


@dataclass(frozen=True)
class Tap:
    """Where a MoE's shortcut comes from.

    Attributes:
        module_name, module: whose input or output is taken.
        side: which of them.
        norm_name, norm: through which the backbone reads the same value; None: it is read as it is.
        blocks: names and modules of the blocks from the tapped one to that of the MoE.
    """

    module_name: str
    module: nn.Module
    side: Side
    norm_name: str | None
    norm: nn.Module | None
    blocks: tuple[tuple[str, nn.Module], ...]


def find_tap(model: nn.Module, moe_name: str, position: str, config: ScMoEConfig) -> Tap:
    """The tap of one MoE layer.

    Args:
        model: holds it.
        moe_name: its path.
        position: "pos1", "pos2" or "pos3".
        config: its `tap` pattern, if there is one, decides instead of the position.

    Raises:
        ScMoEConfigError: no such place; names the module, and what to set.
    """
    list_name, index = _block_of(model, moe_name)
    blocks = model.get_submodule(list_name)
    block_name, previous_name = f"{list_name}.{index}", f"{list_name}.{index - 1}"
    if config.tap is not None:
        return _from_pattern(model, moe_name, config.tap, block_name, previous_name if index else None)
    if position != "pos1" and index == 0:
        raise ScMoEConfigError(
            f'scmoe.position = "{position}": {moe_name} is in the first block of {list_name}, nothing precedes it '
            f'there; use "pos1"{" as scmoe.first_layer_position" if len(blocks) > 1 else ""}'  # type: ignore[arg-type]
        )
    first = block_name if position == "pos1" else previous_name
    names = [first] if first == block_name else [previous_name, block_name]
    window = tuple((name, model.get_submodule(name)) for name in names)
    feed_forward = RES_POST_NORM_BLOCKS.get(type(window[0][1]).__name__)
    if feed_forward is not None:
        name = f"{first}.{feed_forward}" if position == "pos2" else first
        return Tap(name, model.get_submodule(name), "input", None, None, window)
    if not getattr(window[0][1], "pre_norm", True):  # this package's own
        raise ScMoEConfigError(f'{first} is a post-norm block of scmoe_ds: its norms are not where a tap is looked '
                               'for; build the model with scmoe.architecture "scmoe" instead')  # fmt: skip
    for norm_name in POST_NORMS:
        if _has(window[0][1], norm_name):
            raise ScMoEConfigError(f"{first} normalises behind its residual sums ({norm_name}): a shortcut wants a "
                                   "pre-norm model, or name the value that it is to read in scmoe.tap, e.g. "
                                   f'"{{previous}}.{norm_name}:output"')  # fmt: skip
    if position == "pos2":
        norm_name = _first_of(window[0][1], POST_ATTENTION_NORMS, first, "norm between attention and MLP")
        norm = window[0][1].get_submodule(norm_name)
        return Tap(f"{first}.{norm_name}", norm, "input", f"{first}.{norm_name}", norm, window)
    norm_name = _first_of(window[0][1], INPUT_NORMS, first, "norm before the attention")
    norm = window[0][1].get_submodule(norm_name)
    return Tap(first, window[0][1], "input", f"{first}.{norm_name}", norm, window)


def _from_pattern(model: nn.Module, moe_name: str, pattern: str, block_name: str, previous_name: str | None) -> Tap:
    """`{previous}.post_attention_layernorm:input`: a module in the MoE's block or the one before it, and a side."""
    path, _, side = pattern.rpartition(":")
    if side not in ("input", "output") or not path:
        raise ScMoEConfigError(f'scmoe.tap = "{pattern}": must end in ":input" or ":output"')
    if "{previous}" in path and previous_name is None:
        raise ScMoEConfigError(f'scmoe.tap = "{pattern}": {moe_name} is in the first block, nothing precedes it')
    try:
        name = path.format(previous=previous_name, block=block_name)
        module = model.get_submodule(name)
    except (AttributeError, KeyError, IndexError, ValueError):
        raise ScMoEConfigError(f'scmoe.tap = "{pattern}": the model has no such module for {moe_name}; '
                               "{previous} and {block} stand for the two blocks' paths") from None  # fmt: skip
    first = previous_name if previous_name is not None and name.startswith(previous_name) else block_name
    names = [block_name] if first == block_name else [first, block_name]
    window = tuple((each, model.get_submodule(each)) for each in names)
    if side == "input" and "norm" in type(module).__name__.lower():
        return Tap(name, module, "input", name, module, window)
    return Tap(name, module, "input" if side == "input" else "output", None, None, window)


def _block_of(model: nn.Module, moe_name: str) -> tuple[str, int]:
    """Path of the nearest ModuleList above a layer, and the index of the member that holds it."""
    parts = moe_name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:end])
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return name, int(parts[end])
    raise ScMoEConfigError(f"{moe_name} is in no nn.ModuleList of blocks, so that its preceding layer cannot be found; "
                           "hold the model's blocks in one")  # fmt: skip


def _first_of(block: nn.Module, names: Sequence[str], block_name: str, what: str) -> str:
    for name in names:
        if _has(block, name):
            return name
    raise ScMoEConfigError(f"{block_name} ({type(block).__name__}) has no {what} of a known name ({', '.join(names)}); "
                           'set scmoe.tap, e.g. "{previous}.<name of that norm>:input"')  # fmt: skip


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True
