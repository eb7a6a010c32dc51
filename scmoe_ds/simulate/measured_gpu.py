"""A GPU's description with the kernels that a profile measured."""

from __future__ import annotations

from scmoe_ds.simulate.gpu import Efficiency, Gpu
from scmoe_ds.simulate.profile import Profile

_PRODUCTS = ("product", "grouped product")


def with_measured(gpu: Gpu, profile: Profile) -> Gpu:
    """Peaks, bandwidth, launch cost and efficiencies of the profile in place of the description's.

    Shares of the profile refer to its own peak, the best that was measured, and not to a data sheet's. So those of
    kinds that it did not measure are converted. Described peaks of precisions that it did not measure are multiplied by
    the ratio between measured and described peak of those that it did.
    """
    ratios = [measured / gpu.peak[precision] for precision, measured in profile.peak.items() if precision in gpu.peak]
    ratio = max(ratios, default=1.0)
    of_memory = profile.bandwidth / gpu.bandwidth
    efficiency = {
        kind: _divided(each, ratio if kind in (*_PRODUCTS, "attention") else of_memory)
        for kind, each in gpu.efficiency.items()
    }
    efficiency |= {kind: _of_table(kind, profile) for kind in {each.kind for each in profile.table}}
    return gpu.model_copy(
        update={
            "peak": {precision: ratio * peak for precision, peak in gpu.peak.items()} | profile.peak,
            "memory": profile.memory,
            "bandwidth": profile.bandwidth,
            "launch": profile.launch,
            "efficiency": efficiency,
            "table": profile.table,
            "spread": profile.spread,
        }
    )


def _divided(efficiency: Efficiency, ratio: float) -> Efficiency:
    return Efficiency(**{case: min(1.0, share / ratio) for case, share in efficiency.model_dump().items()})


def _of_table(kind: str, profile: Profile) -> Efficiency:
    """Of large kernels: the larger half of those that were measured. For products the best tenth of them, because what
    a shape costs is a factor of its own."""
    measured = sorted((each for each in profile.table if each.kind == kind), key=lambda each: _work(each.shape))
    shares = sorted(min(1.0, each.share) for each in measured[len(measured) // 2 :])
    likely = shares[int((0.9 if kind in _PRODUCTS else 0.5) * (len(shares) - 1))]
    return Efficiency(low=(1 - profile.spread) * likely, likely=likely, high=min(1.0, (1 + profile.spread) * likely))


def _work(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]
