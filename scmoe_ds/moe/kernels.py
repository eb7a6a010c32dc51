"""Which kernels compute on rows, chosen once per device and dtype.

                      everywhere                  where the device and the installed packages have better
    grouped product   none: expert after expert   torch's on compute capability 9.x, 10.x, DeepSpeed's on 8.x; in bf16
    restore           moe/decode.py               DeepSpeed's from 8.0 on (DeepSpeed 0.19.8)
    SwiGLU            silu(gate) * up             DeepSpeed's from 8.0 on (DeepSpeed 0.19.8)
    top-1 gate        moe/gate.py                 moe/top1_triton.py from 8.0 on

DeepSpeed's kernels and ours need Triton. Rows are permuted by torch everywhere: one exact copy per permutation.

Shape suffixes: T tokens, D hidden, K top-k, L local experts, R/S rows sent/received, I/O in/out, F feed-forward.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from scmoe_ds.compat import weighted_restore
from scmoe_ds.errors import first_line
from scmoe_ds.parallel.output import log

if TYPE_CHECKING:
    from scmoe_ds.moe.top1 import Top1Kernels

logger = logging.getLogger("scmoe_ds")
GroupedProduct = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [S, I], weights [L, O, I], the row behind each expert's last [L] int32) → [S, O]."""
Restore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, D], row of each choice [T, K] or -1, fp32 weights [T, K]) → [T, D]; every row belongs to one choice."""
SwiGLU = Callable[[Tensor], Tensor]
"""[..., 2F], the gate first → [..., F]."""


def plain_swiglu(inner: Tensor) -> Tensor:
    """SiLU of the first half times the second."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Kernels:
    """All of them compute their gradients too. By default torch's operators, which run everywhere.

    Attributes:
        top1: the gate's, for tokens of the dtype; it computes in fp32.
    """

    grouped_product: GroupedProduct | None = None
    restore: Restore | None = None
    swiglu: SwiGLU = plain_swiglu
    top1: Top1Kernels | None = None

    def __str__(self) -> str:
        grouped = "none" if self.grouped_product is None else _author(self.grouped_product is torch_product)
        restore, swiglu = _author(self.restore is None), _author(self.swiglu is plain_swiglu)
        top1 = "torch's" if self.top1 is None else "fused"
        return f"grouped product {grouped}, weighted restore {restore}, SwiGLU {swiglu}, top-1 gate {top1}"


def _author(is_torch: bool) -> str:
    return "torch's" if is_torch else "DeepSpeed's"


PLAIN = Kernels()
FUSED = (torch.bfloat16, torch.float16, torch.float32)
"""What DeepSpeed's kernels compute, each in fp32 up to the rounding of its result."""


def kernels_of(rows: Tensor) -> Kernels:
    """The kernels for rows of this device and dtype."""
    if not rows.is_cuda:
        return PLAIN
    return choose_kernels(torch.cuda.get_device_capability(rows.device), rows.dtype)


@functools.cache
def choose_kernels(capability: tuple[int, int], dtype: torch.dtype) -> Kernels:
    """Chooses for a GPU of a compute capability, and says so in the log.

    On other capabilities than 9.x and 10.x (as on GeForce cards of 12.0) torch's grouped product is a loop in which the
    host waits for the GPU, twice per product.
    """
    product: GroupedProduct | None = None
    if dtype == torch.bfloat16 and capability[0] in (9, 10):
        product = torch_product if hasattr(F, "grouped_mm") else None
    elif dtype == torch.bfloat16 and capability >= (8, 0) and get_accelerator().prefer_triton_grouped_mm():
        product = triton_product if triton_runs() else None
    fused = dtype in FUSED and capability >= (8, 0) and get_accelerator().is_triton_supported() and triton_runs()
    kernels = PLAIN
    if fused:
        kernels = Kernels(None, weighted_restore(), packed_swiglu() or plain_swiglu, top1_kernels())
    kernels = replace(kernels, grouped_product=product)
    log(f"kernels on compute capability {'.'.join(map(str, capability))} in {str(dtype)[6:]}: {kernels}")
    return kernels


def torch_product(rows_SI: Tensor, weights_LOI: Tensor, ends_L: Tensor) -> Tensor:
    """A `GroupedProduct`."""
    return F.grouped_mm(rows_SI, weights_LOI.transpose(1, 2), offs=ends_L)


def triton_product(rows_SI: Tensor, weights_LOI: Tensor, ends_L: Tensor) -> Tensor:
    """A `GroupedProduct`."""
    try:
        from deepspeed.ops.triton_ops import group_gemm_triton
    except ImportError:  # DeepSpeed 0.19.4 and 0.19.5
        from deepspeed.moe.group_gemm_triton import group_gemm_triton

    return group_gemm_triton(rows_SI, weights_LOI, ends_L, trans_b=True)


def packed_swiglu() -> SwiGLU | None:
    """DeepSpeed's, which reads both halves in place; None before 0.19.8 and without Triton."""
    try:
        from deepspeed.ops.triton_ops import is_triton_available
        from deepspeed.ops.triton_ops.swiglu_triton import swiglu_packed
    except ImportError:
        return None
    return swiglu_packed if is_triton_available() else None


@functools.cache
def triton_runs() -> bool:
    """Whether Triton compiles and starts a kernel on this node: it needs a C compiler and Python's headers, too."""
    top1 = top1_kernels()
    if top1 is None:
        return False
    try:
        top1.choose(torch.zeros(1, 1, device="cuda"), None)
    except Exception as error:  # of Triton, of a compiler, of a driver
        logger.warning(f"Triton does not run on {socket.gethostname()}, torch's kernels are used: {first_line(error)}")
        return False
    return True


def top1_kernels() -> Top1Kernels | None:
    """Those of this package; None without Triton, or beside a Triton that lacks what they use."""
    try:
        from scmoe_ds.moe.top1_triton import TRITON
    except (ImportError, AttributeError):
        return None
    return TRITON
