"""Computing again in the backward pass what the forward pass would otherwise keep (activation checkpointing).

"full": a run of blocks keeps its input alone. Its forward pass, communication included, is repeated when its backward
begins. "selective": each dense operator keeps its input alone; routed experts and communication are not repeated.

A checkpoint never cuts between the start and the wait of an all-to-all. A repeated forward pass has the schedule and
the random numbers of the first, runs to its end (torch would stop it where nothing more is needed, with transfers still
in flight), and so launches the same collectives in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scmoe_ds.overlap.executor import Activations, PairOutput, Step

Recompute = Literal["full", "selective"]
GRANULARITIES = ("full", "selective")


def recompute_operator(run: Step, activations: Activations) -> Activations:
    """One dense operator of the backbone; whoever times its backward pass times the repetition as well."""
    if not torch.is_grad_enabled():
        return run(activations)
    # One by one: what is kept goes through autograd's hooks, as tensors only do.
    return checkpoint(lambda *tensors: run(Activations(*tensors)), *activations, use_reentrant=False)


def recompute_run(run: Callable[[Tensor], PairOutput], hidden: Tensor) -> PairOutput:
    """A whole run of blocks."""

    def forward(hidden: Tensor) -> PairOutput:
        output = run(hidden)
        return PairOutput(_Repeat.apply(output.hidden), output.l_aux, output.exp_counts)

    return checkpoint(forward, hidden, use_reentrant=False, early_stop=False)


class _Repeat(torch.autograd.Function):
    """Identity behind a run, whose backward asks for a kept tensor and so starts the repetition.

    Without it the run's first backward operator would, and a recorder would take the time for that operator's.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden.new_empty(0))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return grads[0]
