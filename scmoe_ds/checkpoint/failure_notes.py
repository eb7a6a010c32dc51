"""Marks checkpoints that do not train with a note, so that the next --auto-resume goes further back.

A step with a finite loss can leave useless weights (a learning rate far too high, a memory fault). Their checkpoint has
the right checksums, so every restart would end where the first one did.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from scmoe_ds.checkpoint import files
from scmoe_ds.data.durable_files import write_whole

logger = logging.getLogger("scmoe_ds")

FAILURE_FILE = "scmoe_failure.json"
"""Lies in the checkpoint's directory, so a checkpoint that replaces it has none. Not in the manifest."""
FIRST_STEPS = 3
"""When a loss or gradient is not finite within this many steps after a checkpoint, the checkpoint is at fault. A moment
that is not finite shows in the loss of the second step."""


def note(root: Path, iteration: int, reason: str) -> Path | None:
    """Marks the newest checkpoint before an iteration, if it is at most `FIRST_STEPS` older. One rank calls it.

    Args:
        root: directory of --save.
        iteration: the first whose numbers were not finite.
        reason: a line for the next start.

    Returns:
        the checkpoint; None when there is none so close.
    """
    for tag in files.newest_first(root):
        if 0 < iteration - (files.iteration_of(tag) or 0) <= FIRST_STEPS:
            text = json.dumps({"iteration": iteration, "reason": reason}) + "\n"
            try:
                write_whole(root / tag / FAILURE_FILE, text)
            except OSError as error:
                logger.warning("%s: could not note that it does not train (%s)", root / tag, error.strerror)
                return None
            return root / tag
    return None


def read(checkpoint: Path) -> str | None:
    """Why a run from a checkpoint ended at once; None when none has."""
    try:
        return str(json.loads((checkpoint / FAILURE_FILE).read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
