"""Three numbers of a cluster that the paper does not give, fitted to its rows without a shortcut.

The paper names the GPUs and the links, but neither what its kernels reached nor the rate of its all-to-all. At most
three factors scale figures of the cluster's description. They are fitted to speed-ups of top-1 and shared-expert MoE
over top-2 and to the stated share of the communication. No row with a shortcut is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.predict.paper_rows import Row
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.gpu import Efficiency, Gpu

SPEED_UP_WITHIN, SHARE_WITHIN = 0.01, 0.02
"""What a fitted row may be off before it counts as much as another: the paper prints speed-ups to 0.01 and shares to a
few hundredths."""
LIMITS = {
    "products": (0.1, 1.2),
    "memory": (0.3, 1.1),
    "inside": (0.2, 1.2),
    "network": (0.2, 1.2),
    "rows": (0.05, 2.0),
    "launch": (0.5, 10.0),
}
"""Between which a factor is plausible: no machine is much faster than its data sheet. Kernels for the rows of an MoE,
and launches from Python, differ more than others."""
MOST = 30.0
_RESTARTS = 1


@dataclass(frozen=True)
class Factors:
    """On figures of a cluster's description.

    Attributes:
        products: on the GPU's peaks: what the paper's products reached of what is usual.
        memory: on the bandwidth of the GPU's memory.
        inside, network: on the rate of the links inside a node, and of the NICs.
        rows: on the share of the memory's bandwidth that gathers and scatters of rows reach: an MoE's overhead.
        launch: on the time of a kernel's launch.
    """

    products: float = 1.0
    memory: float = 1.0
    inside: float = 1.0
    network: float = 1.0
    rows: float = 1.0
    launch: float = 1.0

    def on(self, cluster: Cluster) -> Cluster:
        """The description with these factors."""
        gpu, inside, between = cluster.gpu, cluster.inside, cluster.between
        share = min(1.0, max(1e-5, _rows(gpu).likely * self.rows))
        efficiency = {**gpu.efficiency, "rows": Efficiency(likely=share, low=share, high=share)}
        changed = {
            "peak": {precision: peak * self.products for precision, peak in gpu.peak.items()},
            "bandwidth": gpu.bandwidth * self.memory,
            "efficiency": efficiency,
            "launch": gpu.launch * self.launch,
        }
        root = inside.root_rate and inside.root_rate * self.inside
        return cluster.model_copy(
            update={
                "gpu": gpu.model_copy(update=changed),
                "inside": inside.model_copy(update={"rate": inside.rate * self.inside, "root_rate": root}),
                "between": between and between.model_copy(update={"nic_rate": between.nic_rate * self.network}),
            }
        )


def _rows(gpu: Gpu) -> Efficiency:
    return gpu.efficiency.get("rows") or gpu.efficiency["pointwise"]


Predict = Callable[[Factors, Sequence[Row]], Sequence[float]]


def fit(rows: Sequence[Row], predict: Predict, free: Sequence[str], start: Factors) -> Factors:
    """The factors that bring the fitted rows closest.

    Args:
        rows: of one cluster.
        predict: the numbers of rows, with these factors.
        free: names of the factors that are fitted; the others stay as in `start`.

    Raises:
        ValueError: a row that the fit must not read.
    """
    if any(not row.fitted for row in rows):
        raise ValueError("the fit reads rows without a shortcut only")

    def factors_of(logarithms: Sequence[float]) -> Factors:
        held = {
            name: min(LIMITS[name][1], max(LIMITS[name][0], math.exp(max(-9.0, min(9.0, float(x))))))
            for name, x in zip(free, logarithms, strict=True)
        }
        return Factors(**{**vars(start), **held})

    def loss(logarithms: Sequence[float]) -> float:
        found = predict(factors_of(logarithms), rows)
        # Weak: of two factors that explain the rows equally well, the one nearer to the description.
        held = sum((x / math.log(MOST)) ** 2 for x in logarithms) / 10
        return held + loss_of(rows, found)

    best = [math.log(getattr(start, name)) for name in free]
    for _ in range(_RESTARTS):
        best = list(_least(loss, best))
    return factors_of(best)


def loss_of(rows: Sequence[Row], found: Sequence[float]) -> float:
    """Squared errors of rows, each over what the row may be off."""
    return sum(((each - row.value) / within(row)) ** 2 for each, row in zip(found, rows, strict=True))


def _least(loss: Callable[[Sequence[float]], float], first: Sequence[float]) -> Sequence[float]:
    from scipy.optimize import minimize  # comes with scikit-learn

    simplex = [first, *([x + 0.7 * (place == each) for place, x in enumerate(first)] for each in range(len(first)))]
    options = {"initial_simplex": simplex, "xatol": 0.01, "fatol": 0.01, "maxfev": 120}
    found: Sequence[float] = minimize(loss, first, method="Nelder-Mead", options=options).x
    return found


def within(row: Row) -> float:
    """What the row may be off before it counts."""
    return SHARE_WITHIN if row.quantity == "share" else SPEED_UP_WITHIN
