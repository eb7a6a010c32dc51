"""The CUDA stream for work that must not wait for the backbone: host copies and launches of all-to-alls."""

from __future__ import annotations

import functools

import torch

from scmoe_ds.parallel import standing


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device. Its priority is high: its work is short, and others wait for it.

    All engines and threads of a process share it. Each orders what it puts there by events of its own, so that sharing
    can make work wait, but nothing is read too early.
    """
    stream = torch.cuda.Stream(device, priority=-1)
    standing.streams.append(stream)
    return stream
