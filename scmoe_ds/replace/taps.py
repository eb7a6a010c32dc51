"""Where a model's preceding-layer representation can be picked up: modules and sides, found by their names.

A block is the nearest ancestor of the MoE that is a member of an nn.ModuleList; in a model without one, the nearest
that has siblings of its own class. Paper section 3: Pos-1 is the input of the block that holds the MoE, Pos-3 that of
the block before it, Pos-2 that block's value between attention and MLP.

A name promises little: `post_attention_layernorm` stands behind the attention's sum in LLaMA, and normalises the
attention's output in OLMo2. The first forward pass therefore checks the values (see tap_check.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepspeed.moe.layer import MoE
from torch import nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError

Side = Literal["input", "output"]

POST_ATTENTION_NORMS = (
    "ln_2",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "layernorm_after",
    "pre_mlp_layernorm",
    "mlp_norm",
    "norm2",
    "ln",
)
"""GPT-2; Gemma 2 and 3 (their post_attention_layernorm ends the attention); LLaMA, Mistral, Qwen, GPT-NeoX, Megatron;
ViT, Swin; megatron-core; this package; timm; MegatronBert."""
INPUT_NORMS = ("ln_1", "input_layernorm", "layernorm_before", "attention_norm", "norm1", "attention.ln")
"""The norms through which the same models' attention reads a block's input."""
MLP_NAMES = ("mlp", "feed_forward")
"""Where a block holds its MLP: GPT-2, LLaMA, Mistral, Qwen2, GPT-NeoX, ViT, Swin; Megatron calls it mlp as well."""
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
        is_users: named in scmoe.tap, not found by the position.
    """

    module_name: str
    module: nn.Module
    side: Side
    norm_name: str | None
    norm: nn.Module | None
    blocks: tuple[tuple[str, nn.Module], ...]
    is_users: bool = False


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
    blocks = blocks_around(model, moe_name)
    if config.tap is not None:
        return _from_pattern(model, moe_name, config.tap, blocks)
    if not blocks:
        raise ScMoEConfigError(
            f"{moe_name} is in no nn.ModuleList and among no blocks of one class, so that its "
            "preceding layer cannot be found; hold the blocks in one, or set scmoe.tap to a "
            'module\'s path, e.g. "encoder.first.norm:input"'
        )
    index = _place(blocks, moe_name)
    assert index is not None
    block_name = blocks[index]
    if position != "pos1" and index == 0:
        raise ScMoEConfigError(
            f'scmoe.position = "{position}": {moe_name} is in the first block of {block_name.rpartition(".")[0]}, '
            f'nothing precedes it there; use "pos1"{" as scmoe.first_layer_position" if len(blocks) > 1 else ""}'
        )
    first = block_name if position == "pos1" else blocks[index - 1]
    window = tuple((name, model.get_submodule(name)) for name in dict.fromkeys((first, block_name)))
    return _by_names(first, position, window)


def _by_names(first: str, position: str, window: tuple[tuple[str, nn.Module], ...]) -> Tap:
    """The tap in the block `first`, which the window begins with, by the names of the block's children."""
    block = window[0][1]
    norm_name, child = None, reads_raw_stream(block)
    if child is None:
        _refuse_post_norm(block, first)
        norm_name = child = (
            _first_of(block, POST_ATTENTION_NORMS, first, "norm between attention and MLP")
            if position == "pos2"
            else _first_of(block, INPUT_NORMS, first, "norm before the attention")
        )
    name, module = (f"{first}.{child}", block.get_submodule(child)) if position == "pos2" else (first, block)
    if norm_name is None:
        return Tap(name, module, "input", None, None, window)
    return Tap(name, module, "input", f"{first}.{norm_name}", block.get_submodule(norm_name), window)


def _refuse_post_norm(block: nn.Module, name: str) -> None:
    if not getattr(block, "pre_norm", True):  # this package's own
        raise ScMoEConfigError(
            f"{name} is a post-norm block of scmoe_ds: its norms are not where a tap is looked "
            'for; build the model with scmoe.architecture "scmoe" instead'
        )
    for norm_name in POST_NORMS:
        if _has(block, norm_name):
            raise ScMoEConfigError(
                f"{name} normalises behind its residual sums ({norm_name}): a shortcut wants a "
                "pre-norm model, or name the value that it is to read in scmoe.tap, e.g. "
                f'"{{previous}}.{norm_name}:output"'
            )


def _from_pattern(model: nn.Module, moe_name: str, pattern: str, blocks: Sequence[str]) -> Tap:
    """`{previous}.post_attention_layernorm:input`, or a module's whole path, and a side."""
    path, _, side = pattern.rpartition(":")
    if side not in ("input", "output") or not path:
        raise ScMoEConfigError(f'scmoe.tap = "{pattern}": must end in ":input" or ":output"')
    index = _place(blocks, moe_name)
    places = {} if index is None else {"block": blocks[index]} | ({"previous": blocks[index - 1]} if index else {})
    if "{previous}" in path and index == 0:
        raise ScMoEConfigError(f'scmoe.tap = "{pattern}": {moe_name} is in the first block, nothing precedes it')
    try:
        name = path.format(**places)
        module = model.get_submodule(name)
    except (AttributeError, KeyError, IndexError, ValueError):
        raise ScMoEConfigError(
            f'scmoe.tap = "{pattern}": the model has no such module for {moe_name}; '
            "{previous} and {block} stand for the two blocks' paths"
        ) from None
    window = tuple((each, model.get_submodule(each)) for each in _between(name, moe_name, blocks, index))
    if side == "input" and "norm" in type(module).__name__.lower():
        return Tap(name, module, "input", name, module, window, is_users=True)
    return Tap(name, module, "input" if side == "input" else "output", None, None, window, is_users=True)


def _place(blocks: Sequence[str], moe_name: str) -> int | None:
    return next((place for place, name in enumerate(blocks) if f"{moe_name}.".startswith(name + ".")), None)


def _between(tap: str, moe_name: str, blocks: Sequence[str], index: int | None) -> Sequence[str]:
    """The blocks whose children are operators: from the tap's block to the layer's."""
    if index is not None:
        for place in range(index, -1, -1):
            if f"{tap}.".startswith(blocks[place] + "."):
                return blocks[place : index + 1]
    # The tap lies outside of the blocks, or there are none: the children of what holds both.
    return [os.path.commonpath([tap.replace(".", "/"), moe_name.replace(".", "/")]).replace("/", ".")]


def blocks_around(model: nn.Module, moe_name: str) -> list[str]:
    """Paths of the blocks among which a layer lies, in their order; empty: the model shows none."""
    parts = moe_name.split(".")
    parents = [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]
    for name in parents:
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return _children(model, name)
    for end, name in zip(range(len(parts) - 1, -1, -1), parents, strict=True):
        of_class = type(model.get_submodule(".".join(parts[: end + 1])))
        alike = [child for child in _children(model, name) if type(model.get_submodule(child)) is of_class]
        if len(alike) > 1 and of_class is not MoE:
            return alike
    return []


def block_of(model: nn.Module, moe_name: str) -> nn.Module | None:
    """The block that holds a layer; None: the model shows no blocks."""
    blocks = blocks_around(model, moe_name)
    place = _place(blocks, moe_name)
    return None if place is None else model.get_submodule(blocks[place])


def _children(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{child}" if name else child for child, _ in model.get_submodule(name).named_children()]


def reads_raw_stream(block: nn.Module) -> str | None:
    """Name of the MLP in a block whose norms end the branches: attention and MLP read the raw residual stream there.

    Swinv2; OLMo2, OLMo3, EXAONE 4.
    """
    if type(block).__name__ == "Swinv2Layer":
        return "intermediate"
    if _has(block, "post_feedforward_layernorm") and not _has(block, "pre_feedforward_layernorm"):
        return next((name for name in MLP_NAMES if _has(block, name)), None)
    return None


def _first_of(block: nn.Module, names: Sequence[str], block_name: str, what: str) -> str:
    for name in names:
        if _has(block, name):
            return name
    raise ScMoEConfigError(
        f"{block_name} ({type(block).__name__}) has no {what} of a known name ({', '.join(names)}); "
        f'set scmoe.tap, e.g. "{{previous}}.<name of that norm>:input"{_norms_text(block)}'
    )


def _norms_text(block: nn.Module) -> str:
    """The norms that a block has, by the names of their classes, for a message."""
    found = [name for name, module in block.named_modules() if name and "norm" in type(module).__name__.lower()]
    return f" (it has {', '.join(found[:6])})" if found else ""


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True
