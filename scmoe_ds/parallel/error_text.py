"""What a program says of an error: a user's mistake in one sentence, a fault with its traceback. No torch."""

from __future__ import annotations

import re
import sys
import traceback

from scmoe_ds.errors import OutOfMemoryError, UserError, mistake_of_path

_CPP_FRAMES = re.compile(
    r"^(Exception raised from .*\(most recent call first\):?|C\+\+ CapturedTraceback:|frame #\d+: .*|"
    r"#\d+ .* from \S+:\d+|<omitting python frames>)\n",
    re.MULTILINE,
)


def mistake_of(error: BaseException) -> UserError | None:
    """The error as one that a user can correct; None for a fault of a program or library."""
    if isinstance(error, UserError):
        return error
    if mistake := mistake_of_path(error):
        return mistake
    exhausted = _is_memory(error) or "can't allocate memory" in str(error)
    if not exhausted:
        return None
    iteration = getattr(error, "scmoe_iteration", None)
    return OutOfMemoryError("" if iteration is None else f"iteration {iteration}: ", short(str(error)))


def _is_memory(error: BaseException) -> bool:
    """Python's error, or torch's, whose class is known by its name while torch is not imported."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def print_stack(error: BaseException, with_cpp: bool = False) -> None:
    """Prints an error's traceback; C++ frames, which a library has put into a message, only if asked for."""
    text = "".join(traceback.format_exception(error))
    print(text if with_cpp else _CPP_FRAMES.sub("", text), end="", file=sys.stderr, flush=True)


def in_words(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    text = short(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def short(text: str) -> str:
    """A library's message without source lines and advice."""
    line = next(iter(text.strip().splitlines()), "")
    line = re.sub(r"^\[[^\]]*\.(cc|cpp|h|hpp):\d+\] ", "", line)
    if "Application timeout caused pair closure" in line:  # gloo, of all but the first
        return "timed out, as another exchange with the same rank did just before"
    return re.split(r"\. This is typically caused|, NCCL version", line)[0][:200]
