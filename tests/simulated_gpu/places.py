"""Where in the product a launch comes from: file and line, and which part of a pair."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

ROOT = Path(__file__).parents[2]
TRANSFER = "dispatch and combine"
PARTS = {
    "comm/all_to_all.py": TRANSFER,
    "comm/hierarchical.py": TRANSFER,
    "comm/transport.py": TRANSFER,
    "comm/wire.py": TRANSFER,
    "comm/counts.py": "counts",
    "moe/choices.py": "gate",
    "moe/decode.py": "decode",
    "moe/expand.py": "experts",
    "moe/experts.py": "experts",
    "moe/gate.py": "gate",
    "moe/kernels.py": "experts",
    "moe/layout.py": "encode",
    "moe/linear_experts.py": "experts",
    "moe/logits.py": "gate",
    "moe/merge.py": "merge",
    "moe/order.py": "gate",
    "moe/per_rank.py": "encode",
    "moe/received.py": "experts",
    "moe/router.py": "gate",
    "moe/z_loss.py": "gate",
}
"""The part that launches from a file of the package belong to; from all others they belong to the backbone."""

_NO_OTHER = ("moe/routed.py", "counts")  # it calls all the others, too

Place = tuple[tuple[str, int], ...]
"""File and line of the innermost callers, the innermost first."""


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _hidden(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


@functools.cache
def _hidden(file: str) -> bool:
    """Whether a file is torch's, Python's or this device's, where nobody looks for the cause."""
    if Path(file).parent == Path(__file__).parent:
        return not Path(file).name.startswith("test_")
    standard = file.startswith(sysconfig.get_path("stdlib")) and "site-packages" not in file
    return standard or file.startswith(("<", str(Path(torch.__file__).parent)))


def place(depth: int = 3) -> Place:
    """The callers outside of torch and of this device."""
    found = []
    for frame in _frames():
        found.append((frame.f_code.co_filename, frame.f_lineno))
        if len(found) == depth:
            break
    return tuple(found)


def text(of: Place) -> str:
    """A place for people: `scmoe_ds/comm/counts.py:62 < scmoe_ds/moe/routed.py:140`."""
    return " < ".join(f"{_short(file)}:{line}" for file, line in of)


def _short(file: str) -> str:
    # Packages first: the environment may lie in this directory.
    for parent in (*(Path(path) for path in sys.path if path.endswith("site-packages")), ROOT):
        if file.startswith(f"{parent}/"):
            return file[len(str(parent)) + 1 :]
    return file


def part() -> str | None:
    """The part of a pair whose code is running: the outermost that PARTS knows; None: no such file is running."""
    found, otherwise = None, None
    for frame in _frames():
        own, weak = _part_of(frame.f_code.co_filename)
        found, otherwise = own or found, weak or otherwise
    return found or otherwise


@functools.cache
def _part_of(file: str) -> tuple[str | None, str | None]:
    own = (part for end, part in PARTS.items() if file.endswith(f"scmoe_ds/{end}"))
    return next(own, None), _NO_OTHER[1] if file.endswith(f"scmoe_ds/{_NO_OTHER[0]}") else None
