"""Memory of whole pages, as reads and writes past the page cache need it."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20


def page_memory(nbytes: int) -> Tensor:
    """[nbytes] uint8 from the start of a page, zeros; in huge pages where the system gives them on request.

    A device writes into each page by itself. In huge pages a read is 500 times fewer pieces: it took a fifth of the
    processor's time here, and beside other work a third of the time.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux
        with contextlib.suppress(OSError):  # of a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return _aligned(torch.frombuffer(memory, dtype=torch.uint8), nbytes, _HUGE_PAGE_BYTES)


def _empty(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def page_aligned(nbytes: int, empty: Callable[[int], Tensor] = _empty) -> Tensor:
    """[nbytes] uint8 from the start of a page.

    Args:
        empty: gives that many bytes in host memory.
    """
    return _aligned(empty(nbytes + PAGE_BYTES), nbytes, PAGE_BYTES)


def page_tensor(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[at least elements] of a dtype: whole pages from the start of one, on the CPU or a GPU; not initialised."""
    nbytes = whole_pages(elements * dtype.itemsize)
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device) if device.type == "cuda" else page_aligned(nbytes)
    return memory.view(dtype)


def whole_pages(nbytes: int) -> int:
    """Rounded up to pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def _aligned(memory: Tensor, nbytes: int, page: int) -> Tensor:
    first = -memory.data_ptr() % page
    return memory[first : first + nbytes]
