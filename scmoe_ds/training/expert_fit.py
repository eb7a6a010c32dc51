"""A new shared expert that makes up for what surgery takes away, by least squares on text.

A converted layer computes w_s · shared(x) + w_r · routed(tap) where the source has computed old(x). So, layer by layer
from the front, with the layers before converted already, the projection [W b] of the shared expert's output minimises

    Σ |old(x) - w_r · routed(tap) - w_s · [W b] [a(x) 1]|² + λ |[W b]|²

over the tokens of a text. a(x) is the inner activation of the shared expert as it is, the mean of the routed ones.

Shape suffixes: T tokens, D hidden, F inner width (and 1 for a bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.converted import ConvertedPair
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.converted import ConvertedMoE
from scmoe_ds.moe.least_squares import solve
from scmoe_ds.moe.merge import merge_weights
from scmoe_ds.trace.recorder import SILENT


@torch.no_grad()
def fit_shared_experts(model: GPT, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Fits the output projection of every converted layer's shared expert, in place. Collective: all ranks run as many
    batches, each its own.

    Args:
        model: as surgery with `fitted` has made it, of a source without a shared expert.
        batches: tokens [B, S] on the model's device; several times as many as an MLP is wide.

    Returns:
        the fitted parameters by their global names.

    Raises:
        ScMoEConfigError: tensor parallelism, which divides the shared expert.
    """
    if model.group is not None:
        raise ScMoEConfigError(
            'scmoe.adapt.shared_expert = "fit": needs whole shared experts; use --tensor-model-parallel-size 1, or '
            "scmoe adapt --shared-expert fit, then --load"
        )
    was_training, before = model.training, model.conversion.converted
    model.eval()
    fitted: dict[str, Tensor] = {}
    for place, layer in enumerate(model.conversion.numbers):
        model.conversion.only(model.conversion.numbers[: place + 1])
        pair = model.runs[layer]
        assert isinstance(pair, ConvertedPair)
        solution_FD = solve(*_sums(model, pair, batches)).to(pair.last.moe.mlp.output.weight.dtype)
        output = pair.last.moe.mlp.output
        name = f"runs.{layer}.blocks.{len(pair.blocks) - 1}.moe.mlp.output."
        weight_FD = solution_FD if output.bias is None else solution_FD[:-1]
        output.weight.copy_(weight_FD.t())
        fitted[f"{name}weight"] = output.weight.detach().clone()
        if output.bias is not None:
            output.bias.copy_(solution_FD[-1])
            fitted[f"{name}bias"] = output.bias.detach().clone()
    model.conversion.only(before)
    model.train(was_training)
    return fitted


def _sums(model: GPT, pair: ConvertedPair, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[F, F] and [F, D] in fp64: the normal equations of a pair's shared expert."""
    layer, listener = pair.layer, _Listener()
    assert isinstance(layer, ConvertedMoE)
    sums: list[Tensor] = []
    for tokens in batches:
        pair.recorder = listener
        model.hidden_states(tokens)
        pair.recorder = SILENT
        hidden, routed = listener.take()
        layer.run_as_base(True)
        old = layer(hidden)[0]
        layer.run_as_base(False)
        shared_weight, routed_weight = merge_weights(layer.merge, hidden, layer.coefficient)
        missing = old - (routed if routed_weight is None else routed * routed_weight)
        inner = layer.mlp.activate(layer.mlp.input(hidden))
        if layer.mlp.output.bias is not None:
            inner = torch.cat([inner, torch.ones_like(inner[..., :1])], dim=-1)
        inner_TF = (inner if shared_weight is None else inner * shared_weight).flatten(0, -2).double()
        products = inner_TF.t() @ inner_TF, inner_TF.t() @ missing.flatten(0, -2).double()
        sums = [total + own for total, own in zip(sums, products, strict=True)] if sums else list(products)
    if dist.is_initialized():
        for total in sums:
            dist.all_reduce(total)
    return sums[0], sums[1]


class _Listener:
    """A pair's recorder that keeps what its merge reads."""

    def __init__(self) -> None:
        self._seen: list[tuple[Any, ...]] = []

    def open(self, what: Any, *tensors: Any, chunk: int = 0) -> tuple[Any, ...]:
        if what == "merge":
            self._seen.append(tensors)
        return tensors

    def close(self, what: Any, *tensors: Any, chunk: int = 0) -> tuple[Any, ...]:
        return tensors

    def watch(self, name: str, chunk: int) -> None:
        return None

    def renamed(self, word: str) -> _Listener:
        return self

    def take(self) -> tuple[Tensor, Tensor]:
        """The current layer's input and the routed output of one pass, and forgets them. A late join opens two merges:
        (shared, hidden), then (routed, its weight)."""
        first, *rest = self._seen
        self._seen = []
        hidden, routed = (first[1], rest[0][0]) if rest else (first[2], first[1])
        return hidden, routed
