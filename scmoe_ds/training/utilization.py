"""How busy a rank's device is: TFLOP/s, their share of what the card can do (MFU), and memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from scmoe_ds.parallel.process import device

_GIB = 2**30

# Dense peaks in TFLOP/s: bf16 and fp16 on tensor cores with fp32 accumulation, fp32 without tensor cores. From NVIDIA's
# and AMD's data sheets and whitepapers; where a sheet gives the number with sparsity, it is halved. Words of the name
# that torch.cuda.get_device_name gives; the first row counts whose words are all there.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500, 80),
    ("B200", 2250, 80),
    ("GH200", 989, 67),
    ("H200 NVL", 835, 60),
    ("H200", 989, 67),
    ("H100 NVL", 835, 60),
    ("H100 PCIe", 756, 51),
    ("H100", 989, 67),
    ("H800 PCIe", 756, 51),
    ("H800", 989, 67),
    ("H20", 148, 44),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("A30", 165, 10.3),
    ("A40", 149.7, 37.4),
    ("A10G", 70, 35),
    ("A10", 125, 31.2),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX A5000", 111.1, 27.8),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090 Ti", 80, 40),
    ("RTX 3090", 71, 35.6),
    ("RTX 3080 Ti", 68.2, 34.1),
    ("RTX 3080", 59.5, 29.8),
    ("V100S", 130, 16.4),
    ("V100 PCIE", 112, 14),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("MI300X", 1307.4, 163.4),
    ("MI250X", 191.5, 23.9),  # a device of torch is one of the card's two dies
)
_OTHER_CARDS = {"LAPTOP", "MAX", "MIG", "SUPER", "TI", "D"}
"""Words with which a name means another card, or a part of one, unless the table's name has them too."""
_BEFORE_BF16 = ("V100S", "V100 PCIE", "V100", "T4")


def peak_tflops(card: str, dtype: torch.dtype, tensor_float_32: bool = False) -> float | None:
    """Dense peak of a card; None if the card is not known, or has no such products.

    Args:
        card: as `torch.cuda.get_device_name` calls it, such as "NVIDIA A100-SXM4-80GB".
        dtype: of the products: bf16, fp16 or fp32.
        tensor_float_32: fp32 products may run as TF32, which tensor cores do at half the speed of bf16.
    """
    words = set(card.upper().replace("-", " ").split())
    for name, half, single in _PEAKS:
        named = set(name.upper().split())
        if named <= words and not (words - named) & _OTHER_CARDS:
            if dtype == torch.float32:
                return half / 2 if tensor_float_32 and name not in _BEFORE_BF16 else single
            return None if dtype == torch.bfloat16 and name in _BEFORE_BF16 else half
    return None


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
