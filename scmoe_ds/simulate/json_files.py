"""JSON files of users: read, checked, and their errors told by path in one sentence each."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from scmoe_ds.errors import UserError, reason_of
from scmoe_ds.simulate.units import FROM_FILE

Read = TypeVar("Read", bound=BaseModel)
_MOST_BYTES = 16 * 2**20
_MOST_FINDINGS = 5
_MOST_DIGITS = 32
"""Of a whole number; Python refuses to read thousands."""
_LONGEST = 100
"""Characters of a value that are shown."""


def read_as(kind: type[Read], path: str | Path, error: type[UserError]) -> Read:
    """What a JSON file describes.

    Raises:
        error: the file cannot be read, is no JSON object, or breaks a rule of `kind`.
    """
    return validated(kind, read_object(path, error), str(path), error)


def read_object(path: str | Path, error: type[UserError]) -> dict[str, Any]:
    """The object of a JSON file. Keys that are written twice, NaN and infinities are errors.

    Raises:
        error: the file cannot be read, or is no such object.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise error(
                f"{path}: has more than {_MOST_BYTES >> 20} MiB; a file of this kind has a few KB: name another"
            )
        whole = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_once,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_short,
        )
    except OSError as failure:
        raise error(f"{path}: cannot be read ({reason_of(failure)}); correct the path or its permissions") from None
    except UnicodeDecodeError as failure:
        raise error(f"{path}: is no text in UTF-8 (byte {failure.start}); write it as such") from None
    except json.JSONDecodeError as failure:
        raise error(f"{path}: line {failure.lineno}, column {failure.colno}: is no JSON ({failure.msg})") from None
    except RecursionError:
        raise error(f"{path}: is nested too deeply; a file of this kind has objects in objects, and no more") from None
    except _Refused as refused:
        raise error(f"{path}: {refused}") from None
    if not isinstance(whole, dict):
        raise error(f"{path}: must be a JSON object, in braces, and is {_kind_of(whole)}")
    return whole


def validated(kind: type[Read], raw: Mapping[str, Any], source: str, error: type[UserError]) -> Read:
    """An object of a file as `kind`; "$schema" is for editors.

    Raises:
        error: it breaks a rule; "source: path = value: rule", a line for each of the first findings.
    """
    try:
        return kind.model_validate({key: raw[key] for key in raw if key != "$schema"}, context=FROM_FILE)
    except ValidationError as failure:
        lines = dict.fromkeys(f"{source}: {line}" for line in _lines(failure, kind))
        raise error("\n".join(list(lines)[:_MOST_FINDINGS])) from None


def finding(path: str, value: object, rule: str) -> str:
    """ "path = value: rule"."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"{path} = {text if len(text) <= _LONGEST else text[:_LONGEST] + ' …'}: {rule}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Advice on a name that does not exist: the nearest that does, or all."""
    by_case = {each.lower(): each for each in valid}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f'did you mean "{by_case[near[0]]}"?' if near else f"there are {', '.join(by_case.values())}"


class _Refused(ValueError):
    """What the `json` module would take."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f'"{key}" is written twice in one object; keep one of them')
        found[key] = value
    return found


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise _Refused(f"{text} is too large for a number; correct it")
    return float(text)


def _short(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise _Refused(f"{text[:_MOST_DIGITS]}… is too large for a number; correct it")
    return int(text)


def _no_number(name: str) -> float:
    raise _Refused(f"{name} is no number of JSON; write the figure, or leave the field out")


def _kind_of(value: object) -> str:
    return {list: "a list", str: "a text", type(None): "null", bool: "true or false"}.get(type(value), "a number")


_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "too_short": "must have at least {min_length}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be more than {gt}",
    "less_than": "must be less than {lt}",
    "model_type": "must be an object, in braces",
    "dict_type": "must be an object, in braces",
    "tuple_type": "must be a list",
    "string_type": "must be a text",
}
"""Of pydantic's kinds of errors, in our words."""


def _lines(failure: ValidationError, kind: type[BaseModel]) -> Iterator[str]:
    errors = failure.errors()
    for found in errors:
        at = found["loc"]
        if found["type"] == "too_short" and any(other["loc"][: len(at)] == at != other["loc"] for other in errors):
            continue  # follows from an error in the list
        path = ".".join(str(part) for part in at)
        context = found.get("ctx", {})
        if found["type"] == "missing":
            yield f"{path}: is missing; add it"
        elif found["type"] == "extra_forbidden":
            yield f"{path}: unknown key; {nearest(str(at[-1]), _fields_at(kind, at[:-1]))}"
        else:
            rule = str(context.get("error") or found["msg"].replace("Input should be", "must be"))
            rule = _RULES[found["type"]].format_map(context) if found["type"] in _RULES else rule
            yield finding(path, found["input"], rule) if path else rule


def _fields_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> Iterable[str]:
    for part in location:
        field = kind.model_fields.get(str(part))
        inner = list(_models(field.annotation)) if field else []
        kind = inner[0] if inner else kind
    return kind.model_fields


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in get_args(annotation):
        yield from _models(each)
