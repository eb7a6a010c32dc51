"""What is started: each program is a module with a `main`, and `scmoe PROGRAM` starts it.

`run` is what all of them do around their job: log, process group, errors in one sentence. `flags` has the command
lines.
"""

import os
import sys
from collections.abc import Sequence

from scmoe_ds.programs.quiet import filter_log


def debug_is_asked(argv: Sequence[str] | None = None) -> bool:
    """Whether the flags (default: the command line's) have --debug, which is heeded before and after they are read."""
    return "--debug" in (sys.argv[1:] if argv is None else argv)


# torch reads these when it is imported. Its C++ warns, with a stack, of each connection that another rank's end closes.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "WARNING" if debug_is_asked() else "ERROR")
if debug_is_asked():
    os.environ.setdefault("TORCH_SHOW_CPP_STACKTRACES", "1")
else:
    filter_log()
