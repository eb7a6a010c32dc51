"""How busy a rank's device is: TFLOP/s, their share of what the card can do (MFU), and memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from scmoe_ds.parallel.process import device
from scmoe_ds.simulate.cards import card_named, peaks_of

_GIB = 2**30


def peak_tflops(card: str, dtype: torch.dtype, tensor_float_32: bool = False) -> float | None:
    """Dense peak of a card; None if the card is not known, or has no such products.

    Args:
        card: as `torch.cuda.get_device_name` calls it, such as "NVIDIA A100-SXM4-80GB".
        dtype: of the products: bf16, fp16 or fp32.
        tensor_float_32: fp32 products may run as TF32, which tensor cores do at half the speed of bf16.
    """
    found = card_named(card)
    if found is None:
        return None
    peaks = peaks_of(found)
    if dtype == torch.float32:
        return peaks.get("tf32", peaks["fp32"]) if tensor_float_32 else peaks["fp32"]
    return peaks.get("bf16" if dtype == torch.bfloat16 else "fp16")


class Utilization:
    """What a rank's device does in training steps.

    Args:
        engine: DeepSpeed's.
        step_flops: operations of a step on one rank, forward and backward.

    Attributes:
        peak: TFLOP/s that the card can do in this precision; None if that is not known.
    """

    def __init__(self, engine: Any, step_flops: float) -> None:
        self.step_flops = step_flops
        tensor_float_32 = torch.get_float32_matmul_precision() != "highest"
        self.peak = peak_tflops(card_name(), compute_dtype(engine), tensor_float_32)

    def of_steps(self, seconds: float) -> dict[str, float | None]:
        """ "tflops" of a rank, and "mfu" from 0 to 1.

        Args:
            seconds: per step.
        """
        tflops = self.step_flops / seconds / 1e12 if seconds else 0.0
        return {"tflops": tflops, "mfu": tflops / self.peak if self.peak else None}


def compute_dtype(engine: Any) -> torch.dtype:
    """The dtype in which the model's products run."""
    autocast = getattr(engine, "torch_autocast_enabled", lambda: False)
    if autocast():
        return torch.bfloat16 if "bf" in str(engine.torch_autocast_dtype()) else torch.float16
    return next(parameter.dtype for parameter in engine.module.parameters() if parameter.is_floating_point())


def peak_memory_gib() -> float:
    """The most that this process had at one time since its start: allocated on its GPU, or resident on a CPU."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / _GIB
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident * (1 if sys.platform == "darwin" else 1024) / _GIB


def card_name() -> str:
    """Torch's name of this rank's GPU, or "CPU"."""
    return torch.cuda.get_device_name() if device().type == "cuda" else "CPU"


def memory_there_gib() -> float:
    """Memory of this rank's GPU in GiB; without a GPU, of the machine."""
    import psutil

    if device().type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / _GIB
    return float(psutil.virtual_memory().total) / _GIB
