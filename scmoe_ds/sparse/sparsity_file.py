"""sparsity.json beside an export: how much computation a threshold leaves out, layer by layer.

A threshold T is compared with the criterion of a choice. For K > 1 that is its share of the token's chosen scores. For
K = 1, where the share would always be 1, it is the probability before renormalisation.

    1T-Drop    criterion < T             not computed
    2T-Drop    criterion < T - spread    not computed
               criterion < T + spread    computed by the major half: the more important half of the expert's neurons

Source: DualSparse-MoE, arXiv 2508.18376, sections on 1T-Drop and 2T-Drop.

Shape suffixes: N choices of all tokens, K choices of each token, E experts, D hidden.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from scmoe_ds.data.durable_files import write_whole
from scmoe_ds.errors import ArgumentError, CheckpointError, reason_of
from scmoe_ds.sparse.importance import Measure

FILE = "sparsity.json"
"""Its name in the directory of the weights."""
Method = Literal["1t", "2t"]
METHODS: tuple[Method, ...] = ("1t", "2t")
Rate = Annotated[float, Field(ge=0, le=1)]
_QUANTILES = 65


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerCurve(_Strict):
    """What was calibrated of a MoE layer: curves of straight lines between points.

    Attributes:
        name: of the layer in the model.
        threshold: of the points, increasing.
        rate_1t, rate_2t: share of the routed experts' computation that each leaves out.
        major_share: of the neurons' importance, what the major halves hold; None: neurons are as trained.
    """

    name: str
    threshold: tuple[float, ...] = Field(min_length=2)
    rate_1t: tuple[Rate, ...]
    rate_2t: tuple[Rate, ...]
    major_share: Rate | None = None

    @model_validator(mode="after")
    def _check(self) -> LayerCurve:
        for rates in (self.rate_1t, self.rate_2t):
            if len(rates) != len(self.threshold) or any(a > b for a, b in pairwise(rates)):
                raise ValueError("a curve has a rate for each threshold, and rates that do not fall")
            if round(rates[-1], 6) < 1:  # or no threshold would have the higher rates
                raise ValueError("a curve ends where all is left out, at a rate of 1")
        if any(a >= b for a, b in pairwise(self.threshold)):
            raise ValueError("thresholds increase")
        return self

    def rate(self, threshold: float, method: Method) -> float:
        """Share of computation that a threshold leaves out."""
        return float(np.interp(threshold, self.threshold, self._rates(method)))

    def threshold_for(self, rate: float, method: Method) -> float:
        """The threshold that leaves a share of computation out."""
        rates = self._rates(method)
        end = int(np.searchsorted(rates, rate))  # the first point with as much; plateaus before it do not count
        if end in (0, len(rates)):
            return self.threshold[min(end, len(rates) - 1)]
        part = (rate - rates[end - 1]) / (rates[end] - rates[end - 1])
        return self.threshold[end - 1] + part * (self.threshold[end] - self.threshold[end - 1])

    def _rates(self, method: Method) -> tuple[float, ...]:
        return self.rate_1t if method == "1t" else self.rate_2t


class Sparsity(_Strict):
    """The file's content.

    Attributes:
        gates: `digest_of` the weights [E, D] of the MoE layers' gates, in the model's order, of what was calibrated.
        neurons: `digest_of` the input projections [F, D] (SwiGLU: [2F, D], the gate's first) of the layers' first
            experts, as they were written: it tells sorted neurons, and parts of experts, from others.
        top_k: routed experts of a token: which criterion it is.
        measure: of the neurons' importance, see scmoe_ds.sparse.importance; None: neurons are as trained.
        spread: of 2T-Drop's two thresholds around T.
        tokens: that were calibrated with.
        layers: in the model's order.
        rate: what generation and evaluation leave out unless their flags say otherwise; None: nothing.
    """

    version: Literal[1] = 1
    gates: str
    neurons: str
    top_k: int = Field(ge=1)
    measure: Measure | None
    spread: float = Field(ge=0, lt=1)
    tokens: int = Field(ge=1)
    layers: tuple[LayerCurve, ...] = Field(min_length=1)
    rate: float | None = Field(default=None, gt=0, lt=1)

    @property
    def is_sorted(self) -> bool:
        """Whether each expert's major half lies first."""
        return self.measure is not None

    def thresholds(self, rate: float, method: Method) -> list[tuple[float, float]]:
        """(skip, halve) of each layer: choices with a criterion below `skip` are not computed, those below `halve` by
        the major half alone.

        Args:
            rate: share of the routed experts' computation to leave out, in (0, 1); each layer leaves out as much.
            method: "1t": both thresholds are equal.

        Raises:
            ArgumentError: another rate, or halves of experts whose neurons are as trained.
        """
        if not 0 < rate < 1:
            raise ArgumentError(f"drop rate = {rate:g}: must be above 0 and below 1; 0.25 leaves a quarter out")
        if method == "2t" and not self.is_sorted:
            raise ArgumentError(
                "2T-Drop computes half of an expert, but the neurons of this model are as trained: take 1T-Drop, or "
                "sort them with scmoe sparsify"
            )
        spread = self.spread if method == "2t" else 0.0
        found = [layer.threshold_for(rate, method) for layer in self.layers]
        return [(threshold - spread, threshold + spread) for threshold in found]

    def write(self, directory: Path) -> None:
        """Beside the weights.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        try:
            write_whole(directory / FILE, self.model_dump_json() + "\n")
        except OSError as error:
            raise CheckpointError(f"{directory / FILE}: cannot be written ({reason_of(error)}); make room") from None

    @classmethod
    def read(cls, directory: Path) -> Sparsity:
        """sparsity.json of a directory.

        Args:
            directory: that `scmoe sparsify` has written, or a checkpoint with this file in it.

        Raises:
            CheckpointError: no such file, or a damaged one.
        """
        path, remedy = directory / FILE, "make it with scmoe sparsify"
        if os.path.lexists(path) and not path.is_file():  # nobody may ever write into a pipe
            raise CheckpointError(
                f"{path}: is no file but a directory, a pipe or a broken link; remove it, and {remedy}"
            )
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: there is no such file, so no threshold is known; {remedy}") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); correct its permissions") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{place}." for place in first["loc"])[:-1]
            found = f"{where}: {first['msg']}" if where else first["msg"]
            raise CheckpointError(f"{path} is damaged: {found.replace('Value error, ', '')}; {remedy}") from None
        except ValueError:
            raise CheckpointError(f"{path} is damaged: it is no UTF-8; {remedy}") from None

    def check(self, source: str, gates: str, neurons: str | None, top_k: int) -> None:
        """Whether the thresholds, and the halves of experts, are those of a model.

        Args:
            source: the model, for the message.
            gates, neurons, top_k: of the model, as the attributes; `neurons` of None: this rank cannot know them.

        Raises:
            CheckpointError: they are of another one.
        """
        found = None
        if gates != self.gates:
            found = "with other gates"
        elif top_k != self.top_k:
            found = f"with {self.top_k} experts of a token, and here are {top_k}"
        elif neurons not in (None, self.neurons):
            found = "whose experts have other neurons, or the same in another order"
        if found is not None:
            raise CheckpointError(
                f"{source}: {FILE} is of another checkpoint, {found}, so its thresholds do not hold; make it anew with "
                "scmoe sparsify, or remove the file"
            )


def digest_of(weights: Iterable[Tensor]) -> str:
    """Names a model by some of its weights. The same for fp32 weights and for their bf16 copy."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(f"{tuple(weight.shape)}".encode())
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def left_out(criterion_N: Tensor, skip: float, halve: float) -> float:
    """Share of the computation that two thresholds leave out of choices with these criteria."""
    return float(((criterion_N < skip).double() + (criterion_N < halve).double()).mean() / 2)


def curve_of(name: str, criterion_N: Tensor, spread: float, major_share: float | None = None) -> LayerCurve:
    """The curves of a layer's choices.

    Args:
        criterion_N: of calibration tokens, floating, at least one.
        spread: of 2T-Drop's two thresholds around T.
    """
    values_N = np.sort(criterion_N.double().cpu().numpy())

    def below(threshold: np.ndarray) -> np.ndarray:
        return np.searchsorted(values_N, threshold) / len(values_N)

    # Rates rise at the values themselves and a spread to either side: quantiles of all three follow each bend.
    quantiles = np.quantile(values_N, np.linspace(0, 1, _QUANTILES))
    past = values_N[-1] + 1e-9  # all choices are below it, also behind a rounding
    points = np.unique(np.concatenate([quantiles, [past], quantiles - spread, quantiles + spread, [past + spread]]))
    rate_2t = (below(points - spread) + below(points + spread)) / 2
    return LayerCurve(
        name=name,
        threshold=tuple(points.tolist()),
        rate_1t=tuple(below(points).tolist()),
        rate_2t=tuple(rate_2t.tolist()),
        major_share=major_share,
    )
