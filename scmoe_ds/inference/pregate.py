"""Guessing which experts a standard MoE will need: the row that a ScMoE's certain migration is compared with.

Without a shortcut the gate reads the current layer, and when it has chosen there is nothing left to hide a migration
behind. The usual remedy is to ask the same gate about an earlier representation, fetch what it says, and fetch again
where it was wrong. Representations of neighbouring layers are alike (paper fig. 10), so that it is often right.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from scmoe_ds.inference.offload import OffloadedExperts
from scmoe_ds.models.blocks import Block
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import ShortcutPair, StagedPair
from scmoe_ds.offload.store import ExpertKey


def guess_experts(model: GPT) -> list[Any]:
    """Has every offloaded MoE layer that reads its own block guess its experts where a ScMoE Pos-2 would know them.

    That is the input of the preceding block's MLP; with an MoE in every block, the input of its own block. The guess is
    the top-k of the layer's own gate, read through its own norm.

    Returns:
        handles of the hooks.

    Raises:
        ValueError: experts that are not offloaded one expert-parallel rank, or layers that need no guess.
    """
    hooks = []
    for pair in model.scheduled_pairs():
        experts = pair.layer.deepspeed_moe.experts
        if not isinstance(experts, OffloadedExperts) or pair.layer.ep_size > 1:
            raise ValueError("experts are guessed for offloaded ones of one expert-parallel rank")
        if isinstance(pair, ShortcutPair):
            raise ValueError("a layer with a shortcut knows its experts: there is nothing to guess")
        blocks: list[Any] = list(pair.blocks)
        early, names = (
            (blocks[-1], ("attention_norm", "attention")) if len(blocks) == 1 else (blocks[-2], ("mlp_norm", "mlp"))
        )
        module = getattr(early, names[0] if early.pre_norm else names[1])
        hooks.append(module.register_forward_pre_hook(partial(_guess, pair, experts)))
    return hooks


def _guess(pair: StagedPair, experts: OffloadedExperts, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    block, gate = pair.blocks[-1], pair.layer.deepspeed_moe.gate
    assert isinstance(block, Block)
    read = block.moe_input(inputs[0]).flatten(0, -2).float()
    logits_TE = read @ gate.wg.weight.float().t()
    chosen_E = torch.zeros_like(logits_TE[0]).index_fill_(0, logits_TE.topk(gate.k, dim=1).indices.flatten(), 1)
    if pair.layer.partition is not None:
        chosen_E = chosen_E.repeat_interleave(pair.layer.partition.parts)
    chosen = [expert for expert, is_chosen in enumerate(chosen_E.tolist()) if is_chosen]  # the host waits for it
    experts.store.guess([ExpertKey(experts.layer, expert) for expert in chosen])
