"""What `scmoe probe` measured on a machine: figures that take the place of a description's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator

from scmoe_ds.simulate.gpu import Frozen, Measured, PeakOf, Spread

Positive = Annotated[float, Field(gt=0)]
Collective = Literal["all-to-all", "all-reduce", "reduce-scatter", "all-gather"]


class CollectiveTimes(Frozen):
    """Times of one collective between the same ranks, by size.

    Attributes:
        ranks: of the group; neighbours, numbered node by node.
        nodes: that they are on, the same number on each.
        ms: bytes and milliseconds, bytes rising. Of an all-to-all the bytes that a rank sends, its own share among
            them; of the others those of the whole tensor on one rank, before a reduce-scatter or after an all-gather.
        spread: relative, of the milliseconds: 0.1 is ± 10 %.
        method: of an all-to-all, as `comm.transport` calls it; "": of its own.
    """

    collective: Collective
    ranks: Annotated[int, Field(ge=2)]
    nodes: Annotated[int, Field(ge=1)] = 1
    ms: Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1)]
    spread: Spread = 0.1
    method: str = ""

    @field_validator("ms")
    @classmethod
    def _rising(cls, ms: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        if any(size >= following for (size, _), (following, _) in pairwise(ms)):
            raise ValueError("bytes must rise from point to point")
        return ms


class Slowdown(Frozen):
    """Computation beside a running all-to-all.

    Attributes:
        method, ranks, nodes, bytes: of the all-to-all, as in `CollectiveTimes`.
        factor: of the computation's time while it runs.
        spread: relative, of the factor.
    """

    method: str
    ranks: Annotated[int, Field(ge=2)]
    nodes: Annotated[int, Field(ge=1)] = 1
    bytes: Positive
    factor: Annotated[float, Field(ge=1)]
    spread: Spread = 0.1


class Profile(Frozen):
    """A machine, as it was measured. Figures are in base units: bytes, seconds, FLOP/s; those of collectives in ms.

    Attributes:
        profile: version of this format.
        device: GPU or CPU, as torch names it.
        date, software: of the measurement: "2026-11-28", and versions by package.
        capability, memory: of the device; bytes.
        nodes, gpus_per_node: that were measured.
        peak: of large products, by precision; shares of `table` refer to it.
        bandwidth: of the memory, of a large copy, read and written bytes together.
        launch: seconds of one kernel launch.
        table: efficiencies by kind, precision and shape, of forward and backward passes.
        spread: relative, of the table's shares.
        collectives: by group and size; all-to-alls by the method that takes least, which training chooses, too.
        other_methods: all-to-alls by the other method.
        counts: seconds of an exchange of row counts, until the host has them, over all ranks; None: not measured.
        slowed_by: factor on computation while a transfer runs beside it; None: not measured.
        slowdowns: the same by method and size.
    """

    profile: Literal[1] = 1
    device: str
    date: str
    software: dict[str, str] = Field({})
    capability: tuple[int, int] = (0, 0)
    memory: Positive
    nodes: Annotated[int, Field(ge=1)] = 1
    gpus_per_node: Annotated[int, Field(ge=1)] = 1
    peak: Annotated[dict[PeakOf, Positive], Field(min_length=1)]
    bandwidth: Positive
    launch: Annotated[float, Field(ge=0)]
    table: tuple[Measured, ...] = ()
    spread: Spread = 0.1
    collectives: tuple[CollectiveTimes, ...] = ()
    other_methods: tuple[CollectiveTimes, ...] = ()
    counts: Positive | None = None
    slowed_by: Annotated[float, Field(ge=1)] | None = None
    slowdowns: tuple[Slowdown, ...] = ()

    def with_method(self, method: str) -> Profile:
        """The same with all-to-alls by this method, where it was measured."""
        every = [*self.collectives, *self.other_methods]
        found = tuple(each for each in every if each.method in ("", method))
        return self.model_copy(
            update={
                "collectives": found,
                "other_methods": tuple(each for each in every if each.method not in ("", method)),
                "slowed_by": slowed_by(self.slowdowns, method),
            }
        )


def slowed_by(slowdowns: Sequence[Slowdown], method: str) -> float | None:
    """The factor of the largest message of a method in the widest group; None: not measured.

    A short transfer is over before much was computed beside it, and noise is all that is seen of it.
    """
    of_method = [each for each in slowdowns if each.method == method]
    if not of_method:
        return None
    return max(of_method, key=lambda each: (each.nodes, each.ranks, each.bytes)).factor
