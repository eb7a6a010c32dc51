"""Checkpoints that do not train: a note beside the tensors, by which the next --auto-resume goes further back.

A step with a finite loss can leave useless weights (a learning rate far too high, a memory fault). Their checkpoint has
the right checksums, so that every restart would end where the first one did.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from scmoe_ds.checkpoint import files

logger = logging.getLogger("scmoe_ds")

FAILURE_FILE = "scmoe_failure.json"
"""Lies in the checkpoint's directory: a checkpoint that takes its place has none. Not in the manifest."""
FIRST_STEPS = 3
"""A loss or gradient that is not finite within this many steps after a checkpoint counts as the checkpoint's fault. A
moment that is not finite shows in the loss of the second step."""


def note(root: Path, iteration: int, reason: str) -> Path | None:
    """Notes that the newest checkpoint before an iteration does not train, if it is one of the last few steps.

    Args:
        root: directory of --save. One rank calls this.
        iteration: the first whose numbers were not finite.
        reason: a line for the next start.

    Returns:
        the checkpoint; None: there is none so close.
    """
    for tag in files.newest_first(root):
        if 0 < iteration - (files.iteration_of(tag) or 0) <= FIRST_STEPS:
            try:
                files.write_whole(
                    root / tag / FAILURE_FILE, json.dumps({"iteration": iteration, "reason": reason}) + "\n"
                )
            except OSError as error:
                logger.warning("%s: could not note that it does not train (%s)", root / tag, error.strerror)
                return None
            return root / tag
    return None


def read(checkpoint: Path) -> str | None:
    """Why a run from a checkpoint ended at once; None: it has not."""
    try:
        return str(json.loads((checkpoint / FAILURE_FILE).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
