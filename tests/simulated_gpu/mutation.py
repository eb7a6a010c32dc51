"""Another text in the place of one in a module, for the duration of a block: what a fault there would do."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any


@contextmanager
def mutated(module: str, old: str, new: str) -> Iterator[None]:
    """Functions and methods of a module run the code of another source text. Whoever has imported them runs it too.

    Args:
        module: e.g. "scmoe_ds.comm.counts".
        old, new: a text inside of one function, and what stands there instead.

    Raises:
        LookupError: the old text does not stand there exactly once, or no function has changed.
    """
    owner = importlib.import_module(module)
    assert owner.__file__ is not None
    source = Path(owner.__file__).read_text()
    if source.count(old) != 1:
        raise LookupError(f"{old!r} stands {source.count(old)} times in {module}; write the mutant anew")
    codes = dict(_codes(compile(source.replace(old, new), owner.__file__, "exec", dont_inherit=True)))
    functions = {each: codes[each.__qualname__] for each in _functions(owner) if each.__qualname__ in codes}
    changed = {each: code for each, code in functions.items() if _differs(each.__code__, code)}
    if not changed:
        raise LookupError(f"{old!r} in {module} is in no function; write the mutant anew")
    before = {each: each.__code__ for each in changed}
    _put(changed)
    try:
        yield
    finally:
        _put(before)


def _put(codes: dict[FunctionType, CodeType]) -> None:
    for function, code in codes.items():
        function.__code__ = code


def _codes(code: CodeType, inside: str = "") -> Iterator[tuple[str, CodeType]]:
    """Functions and classes of a compiled module, by their qualified names."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield inside + each.co_name, each
            yield from _codes(each, f"{inside}{each.co_name}.")


def _differs(one: Any, other: Any) -> bool:
    """Whether two functions do something else. Where they stand in the file does not matter."""
    if not (isinstance(one, CodeType) and isinstance(other, CodeType)):
        return bool(type(one) is not type(other) or one != other)
    if (one.co_code, one.co_names, len(one.co_consts)) != (other.co_code, other.co_names, len(other.co_consts)):
        return True
    return any(_differs(*each) for each in zip(one.co_consts, other.co_consts, strict=True))


def _functions(owner: ModuleType | type) -> Iterator[FunctionType]:
    """Functions and methods that were written in a module, below decorators, too."""
    name = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    for value in vars(owner).values():
        for each in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            while hasattr(each, "__wrapped__"):
                each = each.__wrapped__
            if isinstance(each, FunctionType) and each.__module__ == name:
                yield each
        if isinstance(value, type) and value.__module__ == name:
            yield from _functions(value)
