"""What is left of an adaptation when its result is exported: a plain ScMoE, or one that is converted in part.

Where the model came from, who taught it and in which order its layers were converted is no part of the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint.parsing import parse
from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.config.adapt_section import AdaptConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.layers import GPTSettings


def finished(weights: Weights, description: Mapping[str, Any]) -> tuple[Weights, Mapping[str, Any]]:
    """Weights and description of a model without what only its adaptation needed; others are returned as they are.

    Raises:
        CheckpointError: layers are still to be converted.
    """
    parsed = parse(description, weights.path)
    settings, config = parsed.settings, parsed.config
    adapt = config.adapt
    if adapt is None or adapt.base is None or not isinstance(settings, GPTSettings):
        return weights, description
    layers = config.moe_layers(settings.num_layers)
    now = adapt.converted_at(int(description.get(fields.ITERATION, 0)), layers)
    number = layers if adapt.layers is None else len(adapt.layers)
    if len(now) < number:
        raise CheckpointError(
            f"{weights.path}: {len(now)} of {number} layers are converted so far (scmoe.adapt.convert_every = "
            f"{adapt.convert_every}); export a later checkpoint"
        )
    kept = None
    if len(now) == layers:
        weights = _WithoutBase(weights)
    else:
        kept = AdaptConfig(base=adapt.base, layers=now)
    return weights, {**description, **fields.describe_model(settings, config.model_copy(update={"adapt": kept}))}


class _WithoutBase:
    """Weights without the coefficient networks that only the base reads."""

    def __init__(self, weights: Weights) -> None:
        self.path, self._weights = weights.path, weights

    def names(self) -> list[str]:
        return [name for name in self._weights.names() if ".base_coefficient." not in name]

    def shape(self, name: str) -> Sequence[int]:
        return self._weights.shape(name)

    def read(self, name: str) -> Tensor:
        return self._weights.read(name)
