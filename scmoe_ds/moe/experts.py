"""Expert computation on rows without padding, and an initialisation that does not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn


def run_experts(experts: Experts, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Each local expert on its own rows.

    Args:
        experts: DeepSpeed's container; an expert maps [rows, D] to [rows, D], or to a tuple that starts with it
            (Megatron's MLP returns its bias as well, which DeepSpeed ignores too).
        rows_SD: rows in expert order.
        rows_per_expert: rows of each; zero is fine, the expert's gradients are then zeros.

    Returns:
        [S, D] in the same order.
    """
    outputs = []
    for expert, part in zip(experts.deepspeed_experts, rows_SD.split(list(rows_per_expert)), strict=True):
        output = expert(part)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def initialize_experts(experts: Experts, first_global_id: int) -> None:
    """Gives every expert weights of its own that depend on its global id only.

    DeepSpeed copies one expert to all places of all ranks, so that all of them start equal. Here each is initialised
    anew through the `reset_parameters` of its submodules, from a seed that combines the default generator (which the
    ranks of a run seed alike) with the global id: a run does not depend on how many ranks share the experts.
    """
    if any(parameter.is_meta for parameter in experts.parameters()):
        return
    base = int(torch.randint(2**62, ()).item())
    for local_id, expert in enumerate(experts.deepspeed_experts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((base + first_global_id + local_id) % 2**62)
            expert.apply(_reset)


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
