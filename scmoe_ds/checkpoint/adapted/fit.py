"""An added shared expert of a Hugging Face model that makes up for the moved tap, by least squares on text.

The equation is that of `training.expert_fit`; here the layers are the eager model's.

Shape suffixes: T tokens, D hidden, F inner width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.config.names import Merge
from scmoe_ds.moe.least_squares import solve
from scmoe_ds.moe.merge import merge_weights
from scmoe_ds.replace.modeling_adapted import SharedExpert, Shortcut


@torch.no_grad()
def fit_shared_experts(model: Any, merge: Merge, batches: Iterable[Tensor]) -> None:
    """Fits the down projection of every converted layer's shared expert, in place, from the first layer on.

    Args:
        model: after `install`, with the weights that surgery starts with.
        merge: of the section.
        batches: tokens [B, S]; several times as many as an expert is wide.
    """
    held = list(batches)
    for each in model.scmoe_shortcuts:
        each.parts.converted = False
    for each in model.scmoe_shortcuts:
        each.parts.converted = True
        shared = each.parts.shared_expert
        solution_FD = solve(*_sums(model, each, merge, held))
        shared.down_proj.weight.copy_(solution_FD.t())


def _sums(model: Any, shortcut: Shortcut, merge: Merge, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[F, F] and [F, D] in fp64: the normal equations of a layer's shared expert."""
    parts, seen = shortcut.parts, _Seen(shortcut)
    shared = parts.shared_expert
    assert isinstance(shared, SharedExpert)
    width, hidden_size = shared.down_proj.in_features, shared.down_proj.out_features
    weight = shared.down_proj.weight
    inner_FF = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    missing_FD = torch.zeros(width, hidden_size, dtype=torch.float64, device=weight.device)
    try:
        for batch in batches:
            model(input_ids=batch, use_cache=False)
            hidden, routed = seen.hidden, seen.routed
            of_shared, of_routed = merge_weights(merge, hidden, parts.coefficient)
            routed = routed.view_as(hidden)
            missing = shortcut.of_source(hidden) - (routed if of_routed is None else routed * of_routed)
            inner = shared.inner(hidden)
            inner_TF = (inner if of_shared is None else inner * of_shared).flatten(0, -2).double()
            inner_FF += inner_TF.t() @ inner_TF
            missing_FD += inner_TF.t() @ missing.flatten(0, -2).double()
    finally:
        seen.close()
    return inner_FF, missing_FD


class _Seen:
    """What a layer's shared expert read, and what its routed experts returned, in the last pass."""

    hidden: Tensor
    routed: Tensor

    def __init__(self, shortcut: Shortcut) -> None:
        assert shortcut.parts.shared_expert is not None
        self._handles = [
            shortcut.parts.shared_expert.register_forward_pre_hook(self._read),
            shortcut.mlp.experts.register_forward_hook(self._returned),
        ]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _read(self, shared: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.hidden = args[0]

    def _returned(self, experts: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.routed = output
