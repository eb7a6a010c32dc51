"""What the benchmarks of speed have in common: steps with cold caches, and the hardware for a record."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version

import torch

from scmoe_ds.probe.clock import EVICTED_BYTES as EVICTED_BYTES
from scmoe_ds.probe.environment import cpu_model as cpu_model


def cold(step: Callable[[], object], other: torch.Tensor) -> Callable[[], None]:
    """The step with nothing of it in the caches, as between other pairs in a round or other layers in a model.

    Args:
        other: `EVICTED_BYTES` of anything.
    """

    def run() -> None:
        other.add_(1)
        step()

    return run


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Between which values the median of all possible rounds lies with this confidence, whatever their distribution.

    The interval is that of the sign test: between the j-th value from below and the j-th from above, with the largest j
    such that fewer than j of n values lie on one side of the median with a probability of at most (1 - confidence) / 2.

    Raises:
        ValueError: too few values for this confidence.
    """
    ordered, probability, rank = sorted(values), 0.0, 0
    while (probability := probability + math.comb(len(ordered), rank) / 2 ** len(ordered)) <= (1 - confidence) / 2:
        rank += 1
    if rank == 0:
        raise ValueError(f"{len(ordered)} values have no {100 * confidence:g} % interval of their median")
    return ordered[rank - 1], ordered[-rank]


def environment(device: str | None = None) -> dict[str, str]:
    """Hardware and versions, for the head of a record.

    Args:
        device: its name; default: that of the GPU, if there is one, or of the processor.
    """
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **packages,
        "commit": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
    }


def environment_text(facts: Mapping[str, str]) -> str:
    """What `environment` has found, as a line of a page."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
