"""What a fake step stops at, in one sentence that names the line."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from scmoe_ds.check.fakes import NOT_THE_PROGRAM, CheckError
from scmoe_ds.compat import DataDependentOutputException, DynamicOutputShapeException
from scmoe_ds.errors import UserError, one_line


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """What an operator of torch refuses inside the block becomes a CheckError."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the stack of what it raises
    before, logger.disabled = logger.disabled, True
    try:
        yield
    except (UserError, RecursionError):
        raise
    except (
        RuntimeError,
        DataDependentOutputException,
        DynamicOutputShapeException,
        NotImplementedError,
        IndexError,
        ValueError,
    ) as error:
        raise CheckError(f"{_place(error)}: {_what(error)}") from error
    finally:
        logger.disabled = before


def _place(error: BaseException) -> str:
    """The innermost line of the traceback that is neither torch's nor this package's check."""
    frames = traceback.extract_tb(error.__traceback__)
    found = [each for each in frames if not each.filename.startswith(NOT_THE_PROGRAM)]
    return f"{found[-1].filename}:{found[-1].lineno} ({(found[-1].line or '').strip()})" if found else "?"


def _what(error: BaseException) -> str:
    text = one_line(error, 300)
    devices = re.search(r"at least two devices, (\S+) and (\S+?)!?$", text) or re.search(
        r"two different devices (\S+), (\S+)", text
    )
    if devices:
        return (
            f"tensors on two devices, {devices[1]} and {devices[2]}; move one of them, or make it on the other's device"
        )
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return (
            f"the shape of what {text} returns depends on values of the GPU, for which the host has to wait; mask "
            "instead of selecting, or compute the shape from shapes"
        )
    return text
