"""What machine this is, in words."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

from scmoe_ds.parallel.process import device


def device_name() -> str:
    """Of this rank's GPU as torch gives it, or of the processor."""
    return torch.cuda.get_device_name() if device().type == "cuda" else cpu_model()


def cpu_model() -> str:
    """The processor's name and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def software() -> dict[str, str]:
    """Versions, and on a CPU the number of threads that compute."""
    found = {name: version(name) for name in ("torch", "deepspeed")}
    found["python"] = platform.python_version()
    return found if device().type == "cuda" else found | {"threads": str(torch.get_num_threads())}


def device_bytes(ranks_of_node: int) -> float:
    """Memory of this rank's GPU; without a GPU its share of the machine's."""
    import psutil

    if device().type == "cuda":
        return float(torch.cuda.get_device_properties(device()).total_memory)
    return float(psutil.virtual_memory().total) / ranks_of_node
