"""Matrix products in low precision, and which of them a device has.

    device                            formats, the preferred one first
    CPU                               int8
    GPU of compute capability 8.x     int8 (A100, A800: no fp8)
    GPU of 9.0 and above              fp8, int8
    other GPUs                        none

Both formats scale each row of activations and each output column of a weight by its largest magnitude. int8 products
are summed in int32 and fp8 products in fp32. So an error comes from the rounding of the two factors alone.

Shape suffixes: S rows received, I/O in/out of a projection.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from scmoe_ds.compat import fp8_product, int8_product

INT8_MAX, E4M3_MAX = 127.0, 448.0
LEAST_SCALE = 1e-20
"""Of a row of zeros, which stays one."""
AT_ONCE = 1 << 19
"""On a CPU: so many numbers stay in its second-level cache from one pass over them to the next. What the passes leave
behind fits into memory that the process already has: for a whole weight the kernel would clear new pages each time."""


class Scaled(NamedTuple):
    """A matrix in low precision.

    Attributes:
        values: [R, I] int8 or e4m3.
        scale_R1: [R, 1] fp32; a row is values * scale.
    """

    values: Tensor
    scale_R1: Tensor

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory until a stream that did not allocate it has used it."""
        for tensor in self:
            tensor.record_stream(stream)


class Format:
    """A number format of both factors of a product.

    Attributes:
        name: "int8" or "fp8".
        dtype: of the values.
        largest: value that it has.
        multiple: of which the sizes of a weight must be on a GPU.
        least_rows: fewer rows cannot be multiplied on a GPU.
    """

    name: str
    dtype: torch.dtype
    largest: float
    multiple: int
    least_rows: int

    def scaled(self, matrix_RI: Tensor, scale_R1: Tensor | None = None) -> Scaled:
        """A matrix of any floating dtype, rounded to nearest.

        Args:
            scale_R1: that an earlier call has found for this matrix; it saves reading the matrix a second time.
        """
        if not matrix_RI.is_cuda:
            rows = max(1, AT_ONCE // max(1, matrix_RI.shape[1]))
            if len(matrix_RI) > rows:
                return self._scaled_in_blocks(matrix_RI, scale_R1, rows)
            matrix_RI = matrix_RI.float()  # a CPU reads bf16 slowly, and here it would several times
        scale_R1 = self.scale(matrix_RI) if scale_R1 is None else scale_R1
        return Scaled(self._rounded(matrix_RI, scale_R1).to(self.dtype), scale_R1)

    def _scaled_in_blocks(self, matrix_RI: Tensor, known_R1: Tensor | None, rows: int) -> Scaled:
        values_RI = torch.empty(matrix_RI.shape, dtype=self.dtype)
        scale_R1 = torch.empty(len(matrix_RI), 1) if known_R1 is None else known_R1
        blocks = zip(*(each.split(rows) for each in (matrix_RI, scale_R1, values_RI)), strict=True)
        for matrix, scale, values in blocks:
            matrix = matrix.float()
            if known_R1 is None:
                scale.copy_(self.scale(matrix))
            values.copy_(self._rounded(matrix, scale))
        return Scaled(values_RI, scale_R1)

    def scale(self, matrix_RI: Tensor) -> Tensor:
        """[R, 1] fp32 of each row: its largest magnitude over that of the format."""
        most_R1 = torch.maximum(matrix_RI.amax(1, keepdim=True), matrix_RI.amin(1, keepdim=True).neg_())
        return most_R1.float().div_(self.largest).clamp_(min=LEAST_SCALE)

    def _rounded(self, matrix_RI: Tensor, scale_R1: Tensor) -> Tensor:
        """What `dtype` is made of without an error, or rounds by itself; a tensor of its own."""
        raise NotImplementedError

    def product(self, rows: Scaled, weight: Scaled, bias_O: Tensor | None) -> Tensor:
        """rows · weightᵀ + bias, [S, O]: fp32 for int8, bf16 for fp8."""
        raise NotImplementedError


class Int8(Format):
    """int8 in [-127, 127], as A100s, A800s and CPUs have it."""

    name, dtype, largest = "int8", torch.int8, INT8_MAX
    multiple, least_rows = 8, 17

    def _rounded(self, matrix_RI: Tensor, scale_R1: Tensor) -> Tensor:
        # No value is above the largest, unless the scale is that of other weights.
        return (matrix_RI / scale_R1).round_().clamp_(-INT8_MAX, INT8_MAX)

    def product(self, rows: Scaled, weight: Scaled, bias_O: Tensor | None) -> Tensor:
        """See `Format`."""
        fused = torchao_product() if rows.values.is_cuda else None
        if fused is not None:
            output_SO = fused(rows.values, weight.values.t(), rows.scale_R1)
        else:
            output_SO = int8_product(rows.values, weight.values.t()).float().mul_(rows.scale_R1)
        output_SO = output_SO.mul_(weight.scale_R1.view(1, -1))
        return output_SO if bias_O is None else output_SO.add_(bias_O)


class FP8(Format):
    """e4m3, as H100s and later GPUs have it."""

    name, dtype, largest = "fp8", torch.float8_e4m3fn, E4M3_MAX
    multiple, least_rows = 16, 1

    def _rounded(self, matrix_RI: Tensor, scale_R1: Tensor) -> Tensor:
        # The quotient of the largest value may round above what e4m3 has, which would become NaN.
        return (matrix_RI / scale_R1).clamp_(-E4M3_MAX, E4M3_MAX)

    def product(self, rows: Scaled, weight: Scaled, bias_O: Tensor | None) -> Tensor:
        """See `Format`."""
        scales = rows.scale_R1, weight.scale_R1.view(1, -1)
        output_SO = fp8_product(rows.values, weight.values.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        return output_SO if bias_O is None else output_SO.add_(bias_O)


@functools.cache
def torchao_product() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """torchao's int8 product of a GPU, which scales the rows in the same kernel: (rows [S, I], weights [I, O], fp32
    scales [S, 1]) → fp32 [S, O]. None where torchao is not installed or its Triton kernels are off, as they are without
    TORCHAO_AUTOTUNER_ENABLE=1: it has no kernel of its own then."""
    try:
        from torchao.kernel import intmm
    except ImportError:
        return None
    has_kernel = getattr(intmm, "AUTOTUNER_ENABLE", False) and getattr(intmm, "intmm_triton", None) is not None
    return intmm.int_scaled_matmul if has_kernel else None


FORMATS: Mapping[str, Format] = {"int8": Int8(), "fp8": FP8()}


def formats_of(device: torch.device) -> list[Format]:
    """What a device computes, the preferred format first; none: it has no low precision that torch can use."""
    if device.type == "cpu":
        return [FORMATS["int8"]]
    if device.type != "cuda" or torch.version.hip is not None:
        return []
    major, _ = torch.cuda.get_device_capability(device)
    return [FORMATS[name] for name in (["fp8", "int8"] if major >= 9 else ["int8"] if major == 8 else [])]
