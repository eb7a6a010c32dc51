"""Computing again in the backward pass what the forward pass would otherwise keep (activation checkpointing).

"full": a pair keeps its input alone. When its backward pass begins, its forward pass is repeated, communication
included. "selective": each dense operator keeps its input alone. Routed experts and communication are not repeated.

No checkpoint begins or ends between the start and the wait of an all-to-all. A repeated forward pass has the schedule
and the random numbers of the first one. It runs to its end: torch would stop it where nothing more is needed, with
transfers still in flight. So every rank launches the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scmoe_ds.overlap.executor import Activations, PairOutput, Step

Recompute = Literal["full", "selective"]


def recompute_operator(run: Step, activations: Activations) -> Activations:
    """Runs one dense operator of the backbone. Whoever times its backward pass times the repetition as well."""
    if not torch.is_grad_enabled():
        return run(activations)
    # One by one: what is kept goes through autograd's hooks, as tensors only do.
    return checkpoint(lambda *tensors: run(Activations(*tensors)), *activations, use_reentrant=False)


def recompute_pair(run: Callable[[Tensor], PairOutput], hidden: Tensor) -> PairOutput:
    """Runs a whole pair."""

    def forward(hidden: Tensor) -> PairOutput:
        output = run(hidden)
        return PairOutput(_Repeat.apply(output.hidden), output.l_aux, output.exp_counts)

    return checkpoint(forward, hidden, use_reentrant=False, early_stop=False)


class _Repeat(torch.autograd.Function):
    """Identity behind a pair. Its backward asks for a kept tensor, which starts the repetition.

    Without it the pair's last operator would ask, and a recorder would count the repetition as that operator's time.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden.new_empty(0))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]
