"""Pinned memory: taken in large blocks, and refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scmoe_ds.errors import ArgumentError
from scmoe_ds.offload.pinned import PinnedTensors
from scmoe_ds.offload.sources import HostExperts


class _Weights:
    """Of one tensor."""

    def shape(self, name: str) -> list[int]:
        return [30]

    def read(self, name: str) -> Tensor:
        return torch.zeros(30)


def test_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a power of two are filled, whatever the tensors' sizes. What the system refuses is one sentence."""
    taken: list[int] = []

    def give(nbytes: int, **_: Any) -> Tensor:
        taken.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    sizes = [3000, 70, 5000, 1, 100]
    values = [torch.randn(size) for size in sizes]
    with monkeypatch.context() as patched:
        patched.setattr("scmoe_ds.offload.pinned.BLOCK_BYTES", 32768)
        patched.setattr("scmoe_ds.offload.pinned.torch.empty", give)
        memory = PinnedTensors([4 * size for size in sizes], "--expert-tier host", "do")
        kept = [memory.keep(value, torch.float32) for value in values[:-1]]
        last = memory.keep(values[-1], torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(kept, values[:-1], strict=True))
    assert torch.equal(last, values[-1].bfloat16())
    assert [size for size in taken if size > 0] == [32768, 256 + 512], "in lines of 256 bytes"

    empty = torch.empty

    def refuse(*sizes: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return empty(*sizes, **options)

    monkeypatch.setattr("scmoe_ds.offload.pinned.torch.empty", refuse)
    with pytest.raises(ArgumentError) as raised:
        HostExperts(_Weights(), ["w"], torch.float32, torch.device("cuda"))
    assert str(raised.value).startswith(
        "--expert-tier host = 0.00 GB: so much memory cannot be pinned (CUDA error: out"
    )
    assert "--expert-tier disk" in str(raised.value) and "ulimit" in str(raised.value)
