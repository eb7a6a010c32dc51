"""Activation checkpointing around a hooked pair: what the backward pass repeats has to be what the forward pass did.

one checkpoint holds tap and layer    Both are repeated, in the pieces in which they ran first.
a checkpoint begins between them      The pair runs in one piece, in its layer. The layer's block is repeated before
                                      the tap's block is, so the tapped value is kept for it.
reentrant, and between them           The first pass keeps no gradient: an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scmoe_ds.compat import is_recomputation, saved_tensor_hook
from scmoe_ds.replace.taps import Tap


def checkpoint_region() -> object:
    """Identifies the activation checkpoint that surrounds the call; None outside of any."""
    return saved_tensor_hook()


def is_repeated() -> bool:
    """Whether torch's activation checkpointing repeats the forward pass that is going on."""
    return is_recomputation(checkpoint_region())


class Recomputation:
    """What a repeated pass has to know of the first one.

    Args:
        name: the layer's path, for errors.
        tap: where its shortcut comes from.

    Attributes:
        in_pieces: whether the last first pass ran between tap and layer; False: all of it ran in the layer.
    """

    def __init__(self, name: str, tap: Tap) -> None:
        self.name, self.tap = name, tap
        self.in_pieces = False
        self._kept: tuple[Tensor, Tensor] | None = None  # the tapped value, and part of the layer's input

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # of a pass, which a copy has not had

    def keep(self, tapped: Tensor, hidden_states: Tensor) -> None:
        """A checkpoint begins between tap and layer: keeps the tapped value for the repetition of the layer."""
        self._kept = tapped, _sample(hidden_states)

    def forget(self) -> None:
        """Drops what was kept of the last pass."""
        self._kept = None

    def is_of_the_tap_alone(self) -> bool:
        """Whether the tap's block is repeated, while the layer's was before, with the value that is kept."""
        return is_repeated() and not self.in_pieces and self._kept is not None

    def tapped(self, hidden_states: Tensor, needs_checkpoint_of_both: bool) -> Tensor:
        """The tapped value for a layer that is repeated without its tap.

        Args:
            hidden_states: the layer's input.
            needs_checkpoint_of_both: whether no forward pass has had gradients yet.

        Raises:
            RuntimeError: nothing is kept, or it is another pass's.
        """
        where = self.tap.module_name
        if self._kept is not None:
            value, read = self._kept
            if torch.equal(read, _sample(hidden_states)):
                return value.detach().requires_grad_(value.requires_grad)
            raise RuntimeError(
                f"{self.name}: several forward passes before a backward pass, while an activation checkpoint cuts "
                f"it from its tap {where}, which is known of the last pass alone. Run each "
                "backward pass after its forward pass, or put both into one checkpoint"
            )
        if torch.is_grad_enabled() and needs_checkpoint_of_both:
            raise RuntimeError(
                f"{self.name} is computed again, but not its tap {where}: reentrant activation "
                "checkpointing (DeepSpeed's, or torch's with use_reentrant=True) cuts them apart. Let one checkpoint "
                "hold both blocks (Megatron-DeepSpeed: --checkpoint-num-layers 2), or set scmoe.tap to a module inside "
                'the layer\'s own block, e.g. "{block}.input_layernorm:input", which is Pos-1'
            )
        raise RuntimeError(
            f"{self.name} ran, but not its tap {where} before it; set scmoe.tap to a module that "
            "does. Blocks that share one MoE cannot be replaced: give each its own"
        )


def _sample(hidden_states: Tensor) -> Tensor:
    """Enough of a value to tell it from that of another forward pass."""
    return hidden_states.detach().flatten()[:256].clone()
