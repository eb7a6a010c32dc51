"""Lines of other packages that help nobody who runs one of our programs: which, why, and how they are left out.

A line is left out by its whole text. All else passes, on every rank; with --debug, all does. The launcher is a process
of its own, whose lines `deepspeed --quiet` leaves out.
"""

from __future__ import annotations

import importlib
import logging
import os
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
if not any(map(os.path.exists, ("/dev/nvidia0", "/dev/kfd", "/dev/davinci0", "/dev/accel"))):
    LOGGED.add(
        # True and known to the user of a machine without a card. Beside a card it says that torch is not the right one.
        (
            "deepspeed.accelerator.real_accelerator",
            "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
        )
    )
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


def filter_log() -> None:
    """Leaves useless lines out of DeepSpeed's log from here on, also while DeepSpeed is being imported."""
    log = logging.getLogger("DeepSpeed")
    if _is_useful not in log.filters:
        log.addFilter(_is_useful)


def filter_prints_and_warnings() -> None:
    """Leaves useless lines out of this process's prints and of Python's warnings from here on. Imports DeepSpeed."""
    for module, _ in PRINTS:
        vars(importlib.import_module(module))["print"] = _print
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
