"""From a text to thresholds (DualSparse-MoE, arXiv 2508.18376): what a model's layers show while it reads.

Shape suffixes: E experts, D hidden, F neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError
from scmoe_ds.sparse.importance import LayerSums, Measure, sorted_neurons
from scmoe_ds.sparse.sparsity_file import Sparsity, curve_of, digest_of

FEWEST_TOKENS = 1024
"""With fewer a threshold's rate is hardly known: at 1024 independent choices 25 % has a standard error of 1.4 %."""


class CalibratedLayer(Protocol):
    """A MoE layer of a model that is calibrated.

    Attributes:
        name: in the model.
        gate_ED: the gate's weight.
        input_FD: of the first expert, W1 and where there is one W3 below it: [F, D] or [2F, D].
        top_k: routed experts of a token.
        neurons: of an expert.
        has_w3: whether its experts are of the form W2 (act(W1 x) ⊙ W3 x).
    """

    name: str
    gate_ED: Tensor
    input_FD: Tensor
    top_k: int
    neurons: int
    has_w3: bool

    def sums(self) -> LayerSums:
        """Empty ones, of this layer's sizes."""

    def watched(self, sums: LayerSums) -> AbstractContextManager[Any]:
        """While it is open, each pass of the layer is added to the sums."""


@torch.no_grad()
def read_calibration_text(
    layers: Sequence[CalibratedLayer], batches: Iterable[Tensor], run: Callable[[Tensor], object], source: str
) -> tuple[list[LayerSums], int]:
    """Lets a model read a text, and notes in each layer what its neurons and its gate do.

    Args:
        layers: all MoE layers.
        batches: tokens [B, S] int64.
        run: the model in evaluation mode.
        source: flag and file of the text, for errors.

    Returns:
        of each layer what it has seen; how many tokens were read.

    Raises:
        ArgumentError: fewer tokens than `FEWEST_TOKENS`.
    """
    sums, tokens = [layer.sums() for layer in layers], 0
    with ExitStack() as watching:
        for layer, own in zip(layers, sums, strict=True):
            watching.enter_context(layer.watched(own))
        for batch in batches:
            run(batch)
            tokens += batch.numel()
    if tokens < FEWEST_TOKENS:
        raise ArgumentError(
            f"{source}: {tokens} tokens are too few to calibrate thresholds; give {FEWEST_TOKENS} or more"
        )
    return sums, tokens


def default_spread(top_k: int) -> float:
    """How far 2T-Drop's two thresholds lie from T: a tenth of 1/K, the mean of the criterion.

    The paper has 0.01 for every K from 2 to 8. But what a choice adds to the output grows with its criterion. So half
    an expert is the better bargain within a range that is a share of the threshold, and not a fixed number. Of one
    expert per token the criterion is a probability, often far below 1: there 0.1 halves nearly all that is left out. A
    trained ScMoE lost least with it; a narrower one gains time on a slow link, but less for its loss than 1T-Drop does
    (docs/sparse.md).
    """
    return 0.1 / top_k


def sparsity_of(
    layers: Sequence[CalibratedLayer],
    sums: Sequence[LayerSums],
    tokens: int,
    measure: Measure | None,
    spread: float | None = None,
    rate: float | None = None,
) -> Sparsity:
    """What sparsity.json says, from what calibration has seen.

    Args:
        measure: by which the neurons are sorted; None: they are as trained.
        spread: of 2T-Drop's thresholds around T; None: `default_spread`.
        rate: to leave out unless somebody says otherwise; None: nothing.
    """
    spread = default_spread(layers[0].top_k) if spread is None else spread
    curves = [
        curve_of(layer.name, own.criterion_N, spread, None if measure is None else own.major_share(measure))
        for layer, own in zip(layers, sums, strict=True)
    ]
    return Sparsity(
        gates=digest_of(layer.gate_ED for layer in layers),
        neurons=digest_of(_input(*each, measure) for each in zip(layers, sums, strict=True)),
        top_k=layers[0].top_k,
        measure=measure,
        spread=spread,
        tokens=tokens,
        layers=tuple(curves),
        rate=rate,
    )


def _input(layer: CalibratedLayer, sums: LayerSums, measure: Measure | None) -> Tensor:
    """`input_FD` with its neurons as they will be written."""
    if measure is None:
        return layer.input_FD
    return sorted_neurons(layer.input_FD, sums.order_EF(measure)[0], 0, 2 if layer.has_w3 else 1)
