"""One step of torch's own Adam on an expert's flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.offload.shape import ExpertShape

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's states, as checkpoints have them."""


@dataclass(frozen=True)
class Step:
    """One step of the optimizer that experts still have before them.

    Attributes:
        factor: what gradients are multiplied by, [1] fp32, for clipping.
        ready: the factor's event; None on a CPU.
        kind, options: the optimizer's class, and for each group of `ExpertShape` what its parameters are stepped with.
    """

    factor: Tensor
    ready: torch.cuda.Event | None
    kind: Callable[..., torch.optim.Optimizer]
    options: Mapping[int, Mapping[str, Any]]


def make_step(shape: ExpertShape, step: Step, states: Sequence[Tensor], gradient: Tensor, steps: float) -> None:
    """Steps an expert. Adam goes element by element: on these buffers as on those of ZeRO.

    Args:
        states: fp32 weights and both moments, which change.
        gradient: fp32, clipped.
        steps: that the expert has made before.
    """
    weights, first, second = states
    groups, state = [], {}
    for group, place in shape.groups.items():
        weight, options = weights[place], step.options[group]
        weight.grad = gradient[place]
        groups.append({**options, "params": [weight]})
        on_device = options.get("fused") or options.get("capturable")
        count = torch.full((), steps, dtype=torch.float32, device=weight.device if on_device else "cpu")
        state[weight] = {"step": count, MOMENTS[0]: first[place], MOMENTS[1]: second[place]}
    optimizer = step.kind(groups)
    optimizer.state.update(state)
    optimizer.step()
