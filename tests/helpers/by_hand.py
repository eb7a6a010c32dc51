"""A pair of blocks as a loop over sub-layers in which every sum and every norm is written out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import PlainPair, ShortcutPair


def gpt_by_hand(model: GPT, tokens: Tensor) -> list[Tensor]:
    """[B, S, D] before the first block, and behind every attention and MLP or MoE."""
    hidden = model.embedding(tokens)
    if model.positions is not None:
        hidden = hidden + model.positions.weight[: tokens.shape[1]]
    values = [hidden]
    for pair in model.runs:
        values += pair_by_hand(pair, values[-1])[1:]
    return values


def pair_by_hand(pair: Any, hidden: Tensor) -> list[Tensor]:
    """What enters the pair and each sub-layer's output with its residual; no dropout.

    Placement and scale are read from the block's own settings, the order of operations is this function's.
    """
    values, blocks = [hidden], list(pair.blocks)
    for block in blocks:
        _append(values, block, block.attention_norm, block.attention)
        if block is not blocks[-1]:
            _append(values, block, block.mlp_norm, block.mlp)

    def moe(x: Tensor) -> Tensor:
        return _moe(pair, values, x)

    _append(values, blocks[-1], blocks[-1].mlp_norm, moe)
    return values


def _append(values: list[Tensor], block: Any, norm: Any, layer: Any) -> None:
    x, scale = values[-1], getattr(block, "scale", 1.0)
    if block.pre_norm:
        values.append(x + scale * layer(norm(x)))
    else:
        values.append(norm(x + scale * layer(x)))


def _moe(pair: Any, values: list[Tensor], x: Tensor) -> Tensor:
    """The MoE of a pair that reads x, and through the shortcut one of the earlier representations."""
    moe = pair.blocks[-1].moe
    if isinstance(pair, PlainPair):
        return moe(x)[0]
    shortcut = x
    if isinstance(pair, ShortcutPair):
        block, shortcut = pair.blocks[pair.tap // 2], values[pair.tap]
        if pair.shortcut_norm is not None:
            shortcut = pair.shortcut_norm(shortcut)
        elif block.pre_norm:
            shortcut = (block.mlp_norm if pair.tap % 2 else block.attention_norm)(shortcut)
    routed = moe.begin(shortcut)
    routed.run_experts()
    output = moe.finish(routed, x)[0]
    return output if pair.post_norm is None else pair.post_norm(output)
