"""How an error in the "scmoe" section reads: the JSON path, the value, the rule, the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from scmoe_ds.errors import ScMoEConfigError

_LONGEST = 200
"""Characters of a value that are shown."""


def fail(path: str, value: object, rule: str) -> ScMoEConfigError:
    """The error for one field."""
    text = json.dumps(value, default=_as_written)
    return ScMoEConfigError(f"{path} = {text if len(text) <= _LONGEST else text[:_LONGEST] + ' …'}: {rule}")


def _as_written(value: object) -> object:
    return value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else str(value)


def counted(count: int, noun: str) -> str:
    """ "1 operator", "2 operators"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def unknown_key(path: str, key: str, valid: Collection[str]) -> str:
    """The line for a key that does not exist: names the nearest that does, or all."""
    near = nearest(key, valid)
    return f"{path}: unknown key" + (
        f' (did you mean "{near}"?)' if near else f"; valid keys are {', '.join(sorted(valid))}"
    )


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name that one may have meant, in any case of the letters."""
    by_case = {each.lower(): each for each in valid}
    near = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=cutoff)
    return by_case[near[0]] if near else None


def explain(
    error: ValidationError, section: Mapping[str, Any], valid: Mapping[str, Collection[str]], root: str = "scmoe"
) -> str:
    """pydantic's findings as lines of `scmoe.<path> = <value>: <rule>`.

    Args:
        section: as the user wrote it.
        valid: the fields of the section (key "") and of each object in it.
        root: path of the section.
    """
    lines: dict[str, str] = {}
    for found in error.errors():
        if found["type"] == "default_factory_not_called":  # a default that follows from a field with an error
            continue
        # pydantic appends the member of a union that it tried; only the names that the user wrote are of interest.
        keys = [str(key) for key in found["loc"] if _is_key(section, found["loc"], key)]
        path = ".".join([root, *keys])
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, ScMoEConfigError):
            lines.setdefault(path, str(cause))
        elif found["type"] == "extra_forbidden":
            lines[path] = _unknown_key(path, keys, valid)
        else:
            message = str(cause) if cause else found["msg"].replace("Input should be", "must be")
            if found["type"] in ("model_type", "dict_type"):  # pydantic names the class
                message = "must be an object, {…}"
            line = str(fail(path, found["input"], message))
            lines[path] = f"{lines[path]}; or {message}" if path in lines and message not in lines[path] else line
    return "\n".join(lines.values())


def _is_key(section: Mapping[str, Any], location: tuple[int | str, ...], key: int | str) -> bool:
    objects = [section]
    for parent in location:
        inner = objects[-1].get(str(parent))
        if isinstance(inner, Mapping):
            objects.append(inner)
    return isinstance(key, str) and any(key in keys for keys in objects)


def _unknown_key(path: str, keys: list[str], valid: Mapping[str, Collection[str]]) -> str:
    *parents, key = keys
    for name, fields in valid.items():
        if name and not parents and key in fields:
            return f'{path}: unknown key (did you mean "{name}": {{"{key}"}}?)'
    return unknown_key(path, key, valid[".".join(parents)])


def more_ranks(size: int) -> str:
    """The remedy where ranks cannot be divided into groups of a size."""
    return f"start {size} ranks (deepspeed --num_gpus {size} ...; on CPUs --num_accelerators {size}), or change it"
