"""A warning for a JSON whose "scmoe" section nobody reads, because `deepspeed.initialize` was called with it.

DeepSpeed leaves sections alone that it does not know. A run whose user believes it to be ScMoE would train something
else, without a word. Trainer and Accelerate call `deepspeed.initialize` as well.

The package does not import DeepSpeed for this. It waits until somebody else has.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_ENGINE = "deepspeed.runtime.engine"
_is_read = False


@contextmanager
def section_is_read() -> Iterator[None]:
    """Inside the block, `scmoe_ds.initialize` has read the section of the JSON that DeepSpeed gets."""
    global _is_read
    before, _is_read = _is_read, True
    try:
        yield
    finally:
        _is_read = before


def is_read() -> bool:
    """Whether `scmoe_ds.initialize` is making an engine."""
    return _is_read


def watch_engines() -> None:
    """Lets every engine that DeepSpeed makes from here on look at its JSON; DeepSpeed may be imported later."""
    if _ENGINE in sys.modules:
        _watch(sys.modules[_ENGINE])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; watches the engine's module as soon as the others have found and run it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_watch(module: ModuleType) -> None:
                run(module)
                _watch(module)

            # mypy: a method of this one loader is replaced on purpose.
            spec.loader.exec_module = run_and_watch  # type: ignore[method-assign]
        return spec


def _watch(module: ModuleType) -> None:
    engine = module.DeepSpeedEngine
    make, signature = engine.__init__, inspect.signature(engine.__init__)

    @functools.wraps(make)
    def look_and_make(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        if isinstance(given.get("config"), Mapping) and "scmoe" in given["config"] and not _is_read:
            _warn(given.get("model"))
        make(*args, **kwargs)

    engine.__init__ = look_and_make


def _warn(model: Any) -> None:
    from scmoe_ds.parallel.output import log

    modules = model.modules() if hasattr(model, "modules") else ()
    has_layers = any(base.__module__ == "scmoe_ds.moe.layer" for each in modules for base in type(each).__mro__)
    log(
        'the "scmoe" section of the DeepSpeed JSON does nothing: deepspeed.initialize does not read it. '
        + (
            f"The ScMoE layers of {type(model).__name__} keep what they were made with, and no schedule is timed. "
            if has_layers
            else f"{type(model).__name__} has no ScMoE layer and trains as it is. "
        )
        + "Call scmoe_ds.initialize with the same arguments; Trainer and Accelerate: docs/from_hugging_face.md",
        level=logging.WARNING,
    )
