"""Keys and values of a DeepSpeed JSON against what the installed DeepSpeed knows.

DeepSpeed itself ignores keys that it does not know, reads "4" as 4, and leaves out "auto".
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Collection, Mapping
from enum import Enum
from functools import cache
from typing import Any, get_args

import deepspeed.runtime.config as deepspeed_config
from pydantic import ConfigDict, TypeAdapter, ValidationError

from scmoe_ds.compat import removed_keys
from scmoe_ds.config.batch_sizes import KEYS as BATCH_KEYS
from scmoe_ds.config.deepspeed_keys import Keys, known_keys, quiet
from scmoe_ds.config.messages import fail, unknown_key

_KEEPS_AUTO = ("data_types.keep_in_fp32_modules", "pipeline")
_OWN_AUTO = ("zero_optimization.stage3_", "expert_parallel.")
"""Keys for which DeepSpeed itself knows "auto"."""


def check_keys(whole: Mapping[str, Any], of_section: Collection[str] = ()) -> list[str]:
    """What is wrong with DeepSpeed's part of the JSON, a line each.

    Top-level keys that begin with "_" are the user's own; DeepSpeed does not look at them either.
    """
    theirs = {key: value for key, value in whole.items() if key != "scmoe" and not str(key).startswith("_")}
    top, in_zero = removed_keys()
    removed = _removed(top, theirs, "")
    zero = theirs.get("zero_optimization")
    if isinstance(zero, Mapping):
        removed |= _removed(in_zero, zero, "zero_optimization.")
    lines = [f"{path}: {message}" for path, message in removed.items()]
    rest = {key: value for key, value in theirs.items() if key not in removed}
    lines += _check(rest, {**known_keys(), "scmoe": dict.fromkeys(of_section)}, "", removed)
    return lines or _read_by_deepspeed(rest)


def _removed(messages: Mapping[str, str], section: Mapping[str, Any], prefix: str) -> dict[str, str]:
    return {prefix + key: f"{messages[key].split('. ')[0]}; remove the key" for key in section if key in messages}


def _check(section: Mapping[str, Any], keys: Keys, prefix: str, known_wrong: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        path = f"{prefix}{key}"
        if path in known_wrong or (path == "steps_per_print" and value == math.inf):
            continue  # Accelerate writes infinity, for never
        if key not in keys:
            lines.append(unknown_key(path, key, keys) if prefix else _unknown_at_the_top(key, keys))
        elif path not in _KEEPS_AUTO and not (value == "auto" and path.startswith(_OWN_AUTO)):
            holds = keys[key]
            if not isinstance(holds, dict):
                rule = broken_rule(value, holds)
                lines += [str(fail(path, value, rule))] if rule else _not_finite(value, path)
            elif isinstance(value, Mapping):
                lines += _check(value, holds, path + ".", known_wrong)
            elif value is not None or not prefix:
                lines.append(str(fail(path, value, f'must be an object, such as {{"{next(iter(holds))}": …}}')))
    return lines


def _unknown_at_the_top(key: str, keys: Keys) -> str:
    homes = [name for name, inner in keys.items() if isinstance(inner, dict) and key in inner]
    if len(homes) == 1:
        return f'{key}: unknown key (did you mean "{homes[0]}": {{"{key}"}}?)'
    unknown = unknown_key(key, key, keys)
    if "valid keys" in unknown:  # too many to name
        return f'{key}: unknown key; remove it, or let a key of your own begin with "_"'
    return unknown


def broken_rule(value: Any, holds: Any) -> str | None:
    """Which rule a value breaks, if any: what pydantic says in strict mode, but 5e8 is an integer."""
    if value == "auto":
        return "is filled in by Hugging Face's Trainer alone; write the value, or remove the key"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, float) and value.is_integer() and holds is not float:
        value = int(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large"
    if isinstance(value, bool) and isinstance(holds, type) and issubclass(holds, Enum):
        return "must be a number"
    wants_text = holds is Any or holds is str or str in get_args(holds)
    if isinstance(value, str) and not wants_text and (literal := unquoted(value)) is not None:
        return f"is a string; write {literal} without quotes"
    try:
        _adapter(holds).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        messages = dict.fromkeys(_TYPE_RULES.get(found["type"], found["msg"]) for found in error.errors())
        text = " or ".join(messages).replace("Input should be", "must be")
        return re.sub(r", (\S+) or \1$", r" or \1", text)  # an enumeration with two names for a number
    return None


_TYPE_RULES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "int_from_float": "must be an integer",
}


@cache
def _adapter(holds: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(holds, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:
        return TypeAdapter(Any)


def unquoted(text: str) -> str | None:
    """The number, true or false that a string spells."""
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    try:
        return text if math.isfinite(float(text)) else None
    except ValueError:
        return None


def _not_finite(value: Any, path: str) -> list[str]:
    """NaN and Infinity, which are not JSON but which Python reads, somewhere in a value."""
    if isinstance(value, float) and not math.isfinite(value):
        return [str(fail(path, value, "must be a finite number"))]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [line for key, each in items for line in _not_finite(each, f"{path}.{key}")]


def _read_by_deepspeed(whole: Mapping[str, Any]) -> list[str]:
    """DeepSpeed's own errors when it reads all keys, each under the key that causes it alone."""
    lines: list[str] = []
    rest = {key: value for key, value in whole.items() if key not in BATCH_KEYS}  # they depend on the number of ranks
    while message := _refusal(rest):
        culprit = next((key for key, value in rest.items() if _refusal({key: value}) == message), None)
        if culprit is None:
            return [*lines, f"the DeepSpeed JSON: {message}"]
        lines.append(str(fail(culprit, rest.pop(culprit), message)))
    return lines


def _refusal(whole: Mapping[str, Any]) -> str | None:
    try:
        with quiet():
            deepspeed_config.DeepSpeedConfig(copy.deepcopy({**whole, BATCH_KEYS[1]: 1}))
    except ValidationError as error:
        return "; ".join(found["msg"].partition(", ")[2] or found["msg"] for found in error.errors())
    except Exception as error:  # assertions, KeyError, AttributeError …: whatever it trips over
        return f"DeepSpeed refuses it ({type(error).__name__}: {error})"
    return None
