"""Which GPU and which software a record is of. The driver's own program says it: the GPU is left to the steps."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.harness import measure

_QUERIES = {"device": "name", "driver": "driver_version", "memory": "memory.total", "power limit": "power.limit"}
_PACKAGES = ("triton", "transformers", "megatron-core")


def count() -> int:
    """How many GPUs there are."""
    return torch.cuda.device_count()


def environment(rehearsal: bool) -> dict[str, str]:
    """Card, driver and versions, for the head of a record."""
    queried = {} if rehearsal else _nvidia_smi()
    found = measure.environment(queried.get("device", measure.cpu_model()))
    found |= {name: value for name, value in queried.items() if name != "device"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if torch.version.cuda:
        found |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def _nvidia_smi() -> dict[str, str]:
    """What the driver says of the first GPU; without its program, torch's name of it."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(_QUERIES.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {"device": torch.cuda.get_device_name()}
    return dict(zip(_QUERIES, (part.strip() for part in said.splitlines()[0].split(",")), strict=True))
