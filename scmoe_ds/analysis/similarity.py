"""Cosine similarity and L2 distance between all intermediate representations of a model (paper figures 10, 14, 15).

Both are computed per token and averaged over tokens. The float64 sums run over the batches, so memory does not depend
on the size of the data set.

Shape suffixes: N representations (of one stage), T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scmoe_ds.analysis.probes import Capture, Probe, Representation
from scmoe_ds.analysis.subjects import Subject
from scmoe_ds.errors import AnalysisError

THRESHOLD = 0.8
"""Cosine similarity from which on the two ends of a shortcut are called alike. A hint, no limit: below it, experts that
are trained already get another input than they know; but models that were trained from scratch with such a shortcut
learnt better (benchmarks/results/quality.md)."""
POSITIONS = ("pos1", "pos2", "pos3")
_ELEMENTS_AT_ONCE = 1 << 23
"""N * T * D that are converted to float64 together: 64 MiB."""


class SimilaritySums:
    """Running sums over tokens of every pair's cosine similarity and L2 distance.

    Args:
        representations: in the order in which `add` gets their values. Only those of one stage are compared.

    Raises:
        AnalysisError: a single one.
    """

    def __init__(self, representations: Sequence[Representation]) -> None:
        if len(representations) < 2:
            raise AnalysisError(
                f"the model has {len(representations)} intermediate representation(s); at least 2 are needed to compare"
            )
        self.representations = list(representations)
        self._stages: dict[int, list[int]] = {}
        for number, each in enumerate(representations):
            self._stages.setdefault(each.stage, []).append(number)
        size = len(representations)
        self._cosine = torch.zeros(size, size, dtype=torch.float64)
        self._distance = torch.zeros(size, size, dtype=torch.float64)
        self._norm = torch.zeros(size, dtype=torch.float64)
        self.tokens = dict.fromkeys(self._stages, 0)

    def add(self, values: Sequence[Tensor], batch: int) -> None:
        """
        Args:
            values: [..., D] of each representation, with the same tokens.
            batch: its number, for errors.

        Raises:
            AnalysisError: a value is not finite; names the representation and the batch.
        """
        for each, value in zip(self.representations, values, strict=True):
            if not bool(torch.isfinite(value).all()):
                raise AnalysisError(
                    f"{each.name} is not finite in batch {batch}: the weights are not finite, or the "
                    "dtype cannot hold what the model computes; try --dtype fp32"
                )
        for stage, members in self._stages.items():
            flat = [values[member].reshape(-1, values[member].shape[-1]) for member in members]
            tokens, hidden = flat[0].shape
            at_once = max(_ELEMENTS_AT_ONCE // (len(flat) * hidden), 1)
            place = torch.tensor(members)
            for first in range(0, tokens, at_once):
                self._add_tokens(place, torch.stack([value[first : first + at_once].double() for value in flat], dim=1))
            self.tokens[stage] += tokens

    def _add_tokens(self, place_N: Tensor, value_TND: Tensor) -> None:
        dot_TNN = value_TND @ value_TND.transpose(1, 2)
        square_TN = dot_TNN.diagonal(dim1=1, dim2=2)
        norm_TN = square_TN.sqrt()
        # A representation of zeros has no direction. It counts as 0, not as NaN.
        scale_TN = norm_TN.clamp(min=torch.finfo(torch.float64).tiny).reciprocal() * (norm_TN > 0)
        cosine_NN = torch.einsum("tij,ti,tj->ij", dot_TNN, scale_TN, scale_TN)
        # |a - b|² = |a|² + |b|² - 2ab: rounding leaves 1e-8 of |a| when two representations are the same.
        squared_TNN = square_TN.unsqueeze(1) + square_TN.unsqueeze(2) - 2 * dot_TNN
        pairs = place_N[:, None], place_N
        self._cosine[pairs] += cosine_NN.cpu()
        self._distance[pairs] += squared_TNN.clamp(min=0).sqrt().sum(0).cpu()
        self._norm[place_N] += norm_TN.sum(0).cpu()

    def result(self) -> Similarity:
        """The means over all tokens so far. Raises an AnalysisError if there were none."""
        if not all(self.tokens.values()):
            raise AnalysisError("there are no tokens to compare representations of: give more data")
        stage_N = torch.tensor([each.stage for each in self.representations])
        tokens_N = torch.tensor([self.tokens[each.stage] for each in self.representations])
        other_NN = stage_N[:, None] != stage_N
        cosine = (self._cosine / tokens_N).masked_fill(other_NN, float("nan"))
        distance = (self._distance / tokens_N).fill_diagonal_(0).masked_fill(other_NN, float("nan"))
        first = next(iter(self.tokens.values()))
        return Similarity(tuple(self.representations), cosine, distance, self._norm / tokens_N, first)


@dataclass(frozen=True)
class Similarity:
    """Means over tokens.

    Attributes:
        representations: N of them.
        cosine: [N, N] float64; NaN for different stages.
        distance: [N, N] float64, L2 norm of the difference.
        norm: [N] float64, L2 norm.
        tokens: their number (in the first stage of a pyramid).
    """

    representations: tuple[Representation, ...]
    cosine: Tensor
    distance: Tensor
    norm: Tensor
    tokens: int

    def record(self) -> dict[str, Any]:
        """JSON values; null instead of NaN."""
        return {
            "names": [each.name for each in self.representations],
            "tokens": self.tokens,
            "cosine": _nested(self.cosine),
            "l2": _nested(self.distance),
            "norm": self.norm.tolist(),
        }


def _nested(matrix: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


@torch.inference_mode()
def measure(subject: Subject, batches: Iterable[Any]) -> Similarity:
    """Makes one forward pass per batch.

    Args:
        subject: a model in evaluation mode, and where its representations are.
        batches: what `subject.run` takes, on any device.

    Raises:
        AnalysisError: as `SimilaritySums`, and of `subject.check`.
    """
    sums = SimilaritySums([probe.representation for probe in subject.probes])
    for number, batch in enumerate(batches):
        on_device = batch.to(subject.device)
        if number == 0:
            subject.check(on_device)
        add_batch(sums, subject.probes, lambda on_device=on_device: subject.run(on_device), number)
    return sums.result()


def add_batch(sums: SimilaritySums, probes: Sequence[Probe], run: Any, number: int) -> None:
    """The representations of one forward pass, `run()`."""
    with Capture(probes) as capture:
        run()
        sums.add(capture.take(), number)


def verdict(
    similarity: Similarity, moe_blocks: Sequence[tuple[int, int]], distance: int = 1, trained: str | None = None
) -> dict[str, Any]:
    """The similarity of the two ends of a shortcut at each position: of its tap and of the MoE's own input, which is
    the output of the attention sub-layer of its block (paper section 3).

    Args:
        moe_blocks: (stage, block) of every MoE layer.
        distance: blocks between tap and MoE; 1 in the paper.
        trained: position of the model's own shortcut, whose input its experts were trained on.

    Returns:
        JSON values: "threshold", "positions" by name with "layers", "mean", "least" and "passes" (all layers reach the
        threshold), and "text", one sentence per position.
    """
    place = {(each.stage, each.block, each.kind): number for number, each in enumerate(similarity.representations)}
    positions: dict[str, Any] = {}
    for position in POSITIONS:
        layers, pairs = [], []
        for stage, block in moe_blocks:
            tap = _tap(place, position, stage, block - distance)
            if tap is None:
                continue
            current = place[stage, block, "attention"]
            pairs.append((tap, current))
            names = [similarity.representations[number].name for number in (tap, current)]
            layers.append(
                {
                    "stage": stage,
                    "block": block,
                    "from": names[0],
                    "to": names[1],
                    "cosine": float(similarity.cosine[tap, current]),
                    "l2": float(similarity.distance[tap, current]),
                }
            )
        cosines = [float(similarity.cosine[pair]) for pair in pairs]
        positions[position] = {
            "layers": layers,
            "mean": sum(cosines) / len(cosines) if cosines else None,
            "least": min(cosines, default=None),
            "passes": bool(cosines) and min(cosines) >= THRESHOLD,
        }
    text = [_sentence(name, found, name == trained) for name, found in positions.items()]
    return {"threshold": THRESHOLD, "positions": positions, "text": text}


def _tap(place: dict[Any, int], position: str, stage: int, tapped: int) -> int | None:
    """Number of the representation that a shortcut of a position reads in the block `tapped`; None if there is none."""
    if position == "pos2":
        return place.get((stage, tapped, "attention"))
    # A block's input is the output of the block before it. Pos-1 is the output of the tapped block.
    before = tapped if position == "pos1" else tapped - 1
    if before == -1:
        return place.get((stage, 0, "input"))
    return place.get((stage, before, "mlp"))


def _sentence(position: str, found: dict[str, Any], is_own: bool) -> str:
    title = f"Pos-{position[-1]}"
    if not found["layers"]:
        return f"{title}: no MoE layer has such a preceding representation"
    below = [layer for layer in found["layers"] if layer["cosine"] < THRESHOLD]
    ends = f"{title} ({found['layers'][0]['from']} → {found['layers'][0]['to']}, …)"
    numbers = f"mean cosine similarity {found['mean']:.3f}, least {found['least']:.3f}"
    if not below:
        return f"{ends}: {numbers}; alike (at least {THRESHOLD}) in all {len(found['layers'])} MoE layers"
    where = ", ".join(f"{layer['from']} → {layer['to']} ({layer['cosine']:.3f})" for layer in below)
    consequence = (
        "there a shortcut feeds experts that are trained already another input than they know; a hint only, since "
        "models trained from scratch with such a shortcut did better (benchmarks/results/quality.md)"
    )
    if is_own:
        consequence = "the experts of this model were trained with this shortcut, and on what it feeds them there"
    return (
        f"{ends}: {numbers}; unlike (below {THRESHOLD}) in {len(below)} of {len(found['layers'])} MoE "
        f"layers ({where}): {consequence}"
    )
