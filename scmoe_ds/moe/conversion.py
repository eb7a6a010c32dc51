"""Which MoE layers of an adapted model run as ScMoE now; the others run as the model had them before.

A converted layer and its base (how the layer ran before) compute with the same modules and parameters. So one set of
numbers says what a model is: a partly converted one, one that is converted step by step, or its own teacher.

    conversion.only({0, 2})             # MoE layers 0 and 2 are ScMoE, all others are as in the source
    with conversion.as_source():        # none is: with its weights of before, the model is the source
        ...
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol


class Convertible(Protocol):
    """An MoE layer that can run in both ways.

    Attributes:
        converted: how passes that begin from now on run: True as ScMoE, False as in the source. A pass that has begun,
            and its backward, are not changed.
    """

    converted: bool


class Conversion:
    """The convertible MoE layers of a model.

    Args:
        layers: number of an MoE layer, from 0 over the model, to the layer; in their order. A layer that only ever runs
            as in the source has no entry.
    """

    def __init__(self, layers: Mapping[int, Convertible]) -> None:
        self._layers = dict(layers)

    @property
    def numbers(self) -> list[int]:
        """The MoE layers that can be converted, in order."""
        return list(self._layers)

    @property
    def converted(self) -> list[int]:
        """Those that run as ScMoE now, in order."""
        return [number for number, layer in self._layers.items() if layer.converted]

    def only(self, numbers: Collection[int]) -> None:
        """Converts these layers and no others, for passes that begin from now on. Every rank sets the same.

        Raises:
            ValueError: a number of no convertible layer.
        """
        if strangers := sorted(set(numbers) - self._layers.keys()):
            there = ", ".join(map(str, self._layers)) or "none"
            raise ValueError(f"MoE layer {strangers[0]}: cannot be converted; the convertible layers are {there}")
        for number, layer in self._layers.items():
            layer.converted = number in numbers

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Within the block no layer is converted; afterwards all are as before."""
        before = self.converted
        self.only(())
        try:
            yield
        finally:
            self.only(before)
