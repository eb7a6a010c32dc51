"""Which tokens of a model that others wrote are padding: its `attention_mask`, brought to the MoE layers by hooks.

The mask is Hugging Face's: [B, S], zero for padding. With a key/value cache it is [B, more], and its last S columns are
about the tokens that are read. The hooks are on the modules above the blocks. The innermost module that takes an
`attention_mask` decides (the two stacks of an encoder-decoder have one each); None means no padding. When its mask has
another form (4-D, additive, a dictionary), the call around it decides. Without a 2-D mask no token counts as padding.

A mask of whole numbers may mark tokens that tolerate less precision with TOLERANT (moe/gate.py); to the model itself
they are tokens like others, where its attention reads the mask as zero or not.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.moe.gate import TOLERANT
from scmoe_ds.replace.recomputation import checkpoint_region

logger = logging.getLogger("scmoe_ds")

_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")
_MOST_KEPT = 4096
"""Layers whose blocks may be computed again, over all forward passes before a backward pass."""


class TokenMask:
    """The mask of the forward pass that is going on.

    Args:
        model: its hooks see the calls.
        layers: paths of the MoE layers in it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._calls: list[Tensor | None] = []  # of the modules that are running, outermost first
        self._kept: dict[bytes, Tensor] = {}  # for blocks that are computed again, by what they read
        self._handles: list[Any] = []
        self._has_warned = False
        for module in _above_blocks(model, layers):
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def detach(self) -> None:
        """Removes all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def of(self, hidden: Tensor) -> Tensor | None:
        """Zero for padding, in the shape of the tokens [...] of `hidden` [..., D]; None: there is no padding."""
        if not self._calls:  # a block alone: an activation checkpoint computes it again in the backward pass
            return self._kept.get(_fingerprint(hidden)) if self._kept else None
        used_BS = self._calls[-1]
        if used_BS is None:
            return None
        if hidden.shape[:-1] not in (used_BS.shape, (used_BS.numel(),)):
            if not self._has_warned:
                logger.warning(
                    "attention_mask %s does not fit an MoE layer's hidden states %s: padding is routed like "
                    "every other token",
                    tuple(used_BS.shape),
                    tuple(hidden.shape),
                )
            self._has_warned = True
            return None
        if checkpoint_region() is not None or (self._model.training and not torch.is_grad_enabled()):
            self._kept[_fingerprint(hidden)] = used_BS
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return used_BS

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        around = self._calls[-1] if self._calls else None
        takes, mask = _argument(module, "attention_mask", args, kwargs)
        if takes and mask is None:
            around = None
        elif takes and isinstance(mask, Tensor) and mask.ndim == 2:
            around = _used(mask, _tokens(args, kwargs), around)
        self._calls.append(around)

    def _leave(self, *_: object) -> None:
        if self._calls:  # not if a pre-hook before ours has failed
            self._calls.pop()


def _above_blocks(model: nn.Module, layers: Sequence[str]) -> list[nn.Module]:
    """The modules that hold the layers' blocks, which are members of nn.ModuleLists; outermost first."""
    found: dict[nn.Module, None] = {}
    for layer in layers:
        names = layer.split(".") if layer else []
        for depth in range(len(names)):
            module = model.get_submodule(".".join(names[:depth]))
            if isinstance(module, nn.ModuleList):
                break
            found[module] = None
    return list(found)


def _argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
    """Whether a call can hand an argument over, and what it hands over."""
    if name in kwargs:
        return True, kwargs[name]
    places = list(inspect.signature(module.forward).parameters)
    if name not in places:
        return False, None
    place = places.index(name)
    return True, args[place] if place < len(args) else None


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a module reads of its tokens, [B, S] or [B, S, D]."""
    for value in (*(kwargs.get(name) for name in _TOKENS), *args[:1]):
        if isinstance(value, Tensor) and value.ndim > 1:
            return value
    return None


def _used(mask_BX: Tensor, tokens: Tensor | None, around: Tensor | None) -> Tensor | None:
    """[B, S] of the tokens that are read: bool, or their kinds where one is marked; None if all are real and none is
    marked; `around` if the mask is about something else."""
    if tokens is not None:
        B, S = tokens.shape[:2]
        if len(mask_BX) != B or mask_BX.shape[1] < S:
            return around
        mask_BX = mask_BX[:, mask_BX.shape[1] - S :]
    if mask_BX.is_floating_point() and bool((mask_BX < 0).any()):
        return around  # it is added to the scores: zero stands for real tokens
    if not mask_BX.is_floating_point() and bool((mask_BX == TOLERANT).any()):
        return mask_BX
    used_BS = mask_BX != 0
    return None if bool(used_BS.all()) else used_BS


def _fingerprint(hidden: Tensor) -> bytes:
    """Distinguishes a block's input from its inputs in other forward passes."""
    return hidden.detach().double().sum(-1).cpu().numpy().tobytes()
