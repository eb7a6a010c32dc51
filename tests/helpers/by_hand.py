"""A run of blocks as a loop over sub-layers in which every sum and every norm is written out."""

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
    for run in model.runs:
        values += run_by_hand(run, values[-1])[1:]
    return values


def run_by_hand(run: Any, hidden: Tensor) -> list[Tensor]:
    """What enters the run and each sub-layer's output with its residual; no dropout.

    Placement and scale are read from the block's own settings, the order of operations is this function's.
    """
    values, blocks = [hidden], list(run.blocks)
    for block in blocks:
        _append(values, block, block.attention_norm, block.attention)
        if block is not blocks[-1]:
            _append(values, block, block.mlp_norm, block.mlp)

    def moe(x: Tensor) -> Tensor:
        return _moe(run, values, x)

    _append(values, blocks[-1], blocks[-1].mlp_norm, moe)
    return values


def _append(values: list[Tensor], block: Any, norm: Any, layer: Any) -> None:
    x, scale = values[-1], getattr(block, "scale", 1.0)
    if block.pre_norm:
        values.append(x + scale * layer(norm(x)))
    else:
        values.append(norm(x + scale * layer(x)))


def _moe(run: Any, values: list[Tensor], x: Tensor) -> Tensor:
    """The MoE of a run that reads x, and through the shortcut one of the earlier representations."""
    moe = run.blocks[-1].moe
    if isinstance(run, PlainPair):
        return moe(x)[0]
    shortcut = x
    if isinstance(run, ShortcutPair):
        block, shortcut = run.blocks[run.tap // 2], values[run.tap]
        if run.shortcut_norm is not None:
            shortcut = run.shortcut_norm(shortcut)
        elif block.pre_norm:
            shortcut = (block.mlp_norm if run.tap % 2 else block.attention_norm)(shortcut)
    routed = moe.begin(shortcut)
    routed.run_experts()
    output = moe.finish(routed, x)[0]
    return output if run.post_norm is None else run.post_norm(output)
