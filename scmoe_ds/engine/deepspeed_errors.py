"""DeepSpeed's own errors while it builds an engine, as one sentence that names the section of the JSON.

Most mistakes are found before, by config/. This is for the rest: a service that refuses the login, a kernel that does
not compile, a rule of DeepSpeed or of another package that nobody has met yet.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
from pydantic import ValidationError

from scmoe_ds.config.messages import fail
from scmoe_ds.errors import ScMoEConfigError, first_line
from scmoe_ds.parallel.error_text import mistake_of
from scmoe_ds.parallel.failures import failed_collective

_PACKAGE = Path(deepspeed.__file__).parent
_WHOLE = "the DeepSpeed JSON"
_PLACES = {
    r"monitor/(wandb|comet|tensorboard|csv_monitor)\.py": r"\1",
    r"runtime/lr_schedules\.py|runtime/engine\.py:(_configure_lr_scheduler|_scheduler_from_config)": "scheduler",
    r"runtime/engine\.py:_configure_(basic_)?optimizer": "optimizer",
    r"runtime/engine\.py:_configure_zero_optimizer": "zero_optimization",
    r"runtime/engine\.py:_configure_(fp16|bf16)_optimizer": r"\1",
    r"runtime/engine\.py:_configure_checkpointing|runtime/checkpoint_engine/": "checkpoint",
    r"runtime/activation_checkpointing/": "activation_checkpointing",
    r"module_inject/auto_ep|moe/ep_": "expert_parallel",
    r"runtime/engine\.py:(_configure_expert_parallel|_validate_autoep|_resolve_replacement)": "expert_parallel",
    r"profiling/": "flops_profiler",
    r"comm/config\.py|utils/comms_logging\.py": "comms_logger",
    r"runtime/(\w+/)?\w*config\w*\.py": _WHOLE,
}
"""Pattern of a place in DeepSpeed, as "file:function": the section of the JSON that it works on."""


@contextmanager
def errors_name_the_section(whole: Mapping[str, Any], handed_over: Collection[str] = ()) -> Iterator[None]:
    """Around DeepSpeed's start.

    Args:
        whole: the JSON.
        handed_over: sections that the user replaces by an object; its errors stay as they are.

    Raises:
        ScMoEConfigError: an error of DeepSpeed, or of a package that it uses, while it works on a section. Errors of
            collectives and of all other parts of DeepSpeed stay as they are.
    """
    try:
        yield
    except Exception as error:
        name = None if mistake_of(error) or failed_collective(error) else _section_at_fault(error)
        rule = f"DeepSpeed stops at it ({_words_of(error)}); correct it, or leave it out"
        if name == _WHOLE:
            raise ScMoEConfigError(f"{name}: {rule}") from error
        if name is None or name not in whole or name in handed_over:
            raise
        raise fail(name, whole[name], rule) from error


def _section_at_fault(error: Exception) -> str | None:
    """That of the innermost frame that works on one."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            place = f"{file.relative_to(_PACKAGE).as_posix()}:{frame.f_code.co_name}"
            for pattern, name in _PLACES.items():
                if found := re.match(pattern, place):
                    return found.expand(name)
    return None


def _words_of(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return f"{type(error).__name__}: {first_line(error)}".rstrip(".: ")
