"""What a GPU does: peaks, memory, efficiencies. `cards.py` has those that are known by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scmoe_ds.simulate.units import Bandwidth, Bytes, FlopRate, Seconds

Share = Annotated[float, Field(gt=0, le=1, strict=True)]
Spread = Annotated[float, Field(ge=0, lt=1, strict=True)]
Count = Annotated[int, Field(ge=1, le=10**6, strict=True)]
PeakOf = Literal["bf16", "fp16", "tf32", "fp32"]


class Frozen(BaseModel):
    """What the files of clusters and profiles consist of."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Efficiency(Frozen):
    """A share of a peak that is reached, and how sure it is.

    Attributes:
        likely, low, high: of the peak; low ≤ likely ≤ high.
    """

    likely: Share
    low: Share
    high: Share

    @model_validator(mode="after")
    def _in_order(self) -> Efficiency:
        if not self.low <= self.likely <= self.high:
            raise ValueError(f"low {self.low:g}, likely {self.likely:g} and high {self.high:g} must not decrease")
        return self


class Measured(Frozen):
    """Efficiency of one kind of kernel at one shape, of a table.

    Attributes:
        kind: of `work.Kernel`.
        shape: rows, inner, columns of a product (of one of the group); span, size of a head, heads of all sequences of
            an attention; for other kinds (bytes, 1, 1).
        share: of the peak (products, attention) or of the memory's bandwidth (all others). May exceed 1: caches.
        phase: a kernel of which pass it is of; None: of either.
        precision: in which it was measured; None: any.
        ms: median of one call; None: not known.
        spread: relative, of this share: 0.1 is ± 10 %; None: not known.
    """

    kind: str
    shape: tuple[int, int, int]
    share: Annotated[float, Field(gt=0, strict=True)]
    phase: Literal["forward", "backward"] | None = None
    precision: PeakOf | None = None
    ms: Annotated[float, Field(gt=0)] | None = None
    spread: Spread | None = None


class Gpu(Frozen):
    """A GPU type, or what stands in for one.

    Attributes:
        name: as torch gives it.
        peak: FLOP/s by precision: "bf16", "fp16", "tf32", "fp32".
        memory: that torch sees, bytes.
        bandwidth: of its memory.
        launch: host time of one kernel launch, which nothing hides when kernels are shorter.
        communication_share: of the SMs that a running collective takes from the computation beside it.
        efficiency: by kind of kernel, where `table` has nothing near its shape.
        table: measured efficiencies.
        spread: relative, of the table's shares: 0.1 is ± 10 %.
        capability: of CUDA; (0, 0) for a CPU.
        multiprocessors: that compute the tiles of a product at the same time; 0: not known, or a CPU. Shares of small
            products are lower where they are known.
    """

    name: str
    peak: dict[PeakOf, FlopRate]
    memory: Bytes
    bandwidth: Bandwidth
    launch: Seconds
    communication_share: Annotated[float, Field(ge=0, lt=1, strict=True)]
    efficiency: dict[str, Efficiency]
    table: tuple[Measured, ...] = ()
    spread: Spread = 0.1
    capability: tuple[int, int] = (0, 0)
    multiprocessors: Annotated[int, Field(ge=0, le=4096, strict=True)] = 0


def in_units(gpu: Gpu) -> dict[str, Any]:
    """A GPU as JSON has it."""
    return {
        **gpu.model_dump(mode="json"),
        "peak": {precision: f"{peak:.12g} FLOP/s" for precision, peak in gpu.peak.items()},
        "memory": f"{gpu.memory:.12g} B",
        "bandwidth": f"{gpu.bandwidth:.12g} B/s",
        "launch": f"{gpu.launch:.12g} s",
    }
