"""DeepSpeed JSONs that differ in a few values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def changed(whole: dict[str, Any], paths: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A copy with other values under dotted paths (as keywords: dots as __); None removes."""
    whole = copy.deepcopy(whole)
    for path, value in {**(paths or {}), **{key.replace("__", "."): value for key, value in more.items()}}.items():
        *parents, key = path.split(".")
        target = whole
        for parent in parents:
            target = target.setdefault(parent, {})
        if value is None:
            target.pop(key)
        else:
            target[key] = value
    return whole
