"""Lines of other packages that help nobody who runs one of our programs: which, why, and how they are left out.

A line is left out by its whole text. All else passes, on every rank. The launcher is a process of its own, whose lines
`deepspeed --quiet` leaves out.
"""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from typing import Any

PRINTS = {
    # DeepSpeed makes a group for each expert-parallel size when it meets the first layer.
    ("deepspeed.moe.layer", "No existing process group found, creating a new group named: *"),
    # Said at every start, also when nothing was built. parallel/compilation.py says when something is.
    ("deepspeed.comm.torch", "DeepSpeed * built successfully"),
}
LOGGED = {
    # A schedule asks itself for the rate while DeepSpeed makes it, before any step.
    ("deepspeed.runtime.lr_schedules", "Attempting to get learning rate from scheduler before it has started"),
}
WARNINGS = {
    # DeepSpeed's ZeRO calls these. A newer DeepSpeed will call the new names.
    (
        "torch.distributed.distributed_c10d",
        "`torch.distributed.all_gather_into_tensor` is deprecated. "
        "Please use `torch.distributed.all_gather_single` instead.",
    ),
    (
        "torch.distributed.distributed_c10d",
        "`torch.distributed.reduce_scatter_tensor` is deprecated. "
        "Please use `torch.distributed.reduce_scatter_single` instead.",
    ),
}
"""Each is (the module that says it, its text, in which "*" stands for any text). tests/programs/test_quiet.py looks
whether the installed packages still have these texts."""


def leave_out_useless_lines() -> None:
    """Leaves them out of this process's prints, of DeepSpeed's log and of Python's warnings, from here on."""
    for module, _ in PRINTS:
        vars(importlib.import_module(module))["print"] = _print
    log = logging.getLogger("DeepSpeed")
    if _is_useful not in log.filters:
        log.addFilter(_is_useful)
    for _, text in WARNINGS:
        warnings.filterwarnings("ignore", _pattern(text))


def _print(*values: object, **how: Any) -> None:
    if not _matches(" ".join(map(str, values)), PRINTS):
        print(*values, **how)


def _is_useful(record: logging.LogRecord) -> bool:
    return not _matches(record.getMessage(), LOGGED)


def _matches(line: str, table: set[tuple[str, str]]) -> bool:
    return any(re.match(_pattern(text), line, re.DOTALL) for _, text in table)


def _pattern(text: str) -> str:
    return ".*".join(map(re.escape, text.split("*"))) + r"\Z"
