"""Which tests start processes, from their code: `make fast` leaves them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

DIRECTORIES = {"distributed", "cluster", "gpu"}
STARTERS = {"run_distributed", "subprocess", "Popen", "multiprocessing"}
FOLLOWED = ("tests.", "lab.", "benchmarks.")


def spawns(item: pytest.Function) -> bool:
    """Whether a test, one of its fixtures, or a function of the tests that they call names what starts a process."""
    if DIRECTORIES & set(Path(item.path).parts):
        return True
    fixtures = [definition.func for each in item._fixtureinfo.name2fixturedefs.values() for definition in each]
    return _names_a_starter([item.function, *fixtures], set())


def _names_a_starter(functions: list[Callable[..., Any]], seen: set[int]) -> bool:
    for function in functions:
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        names = set(_names(function.__code__))
        if names & STARTERS:
            return True
        found = [function.__globals__.get(name) for name in names]
        modules = [each for each in found if isinstance(each, ModuleType)]
        found += [vars(module).get(name) for module in modules for name in names]
        called = [
            each for each in found if callable(each) and str(getattr(each, "__module__", "")).startswith(FOLLOWED)
        ]
        called += [value for each in called if isinstance(each, type) for value in vars(each).values()]
        if _names_a_starter(called, seen):
            return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
