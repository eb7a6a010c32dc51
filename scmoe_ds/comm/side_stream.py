"""The CUDA stream for work that must not wait for the backbone: host copies and launches of all-to-alls."""

from __future__ import annotations

import functools

import torch


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device. Its priority is high: its work is short, and others wait for it."""
    return torch.cuda.Stream(device, priority=-1)
