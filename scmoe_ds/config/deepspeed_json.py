"""Reads the DeepSpeed JSON, and finds values in it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Union

from scmoe_ds.errors import ScMoEConfigError


class _Repeating(dict[str, Any]):
    """An object of the file in which a key occurs several times."""

    repeated: list[str]


class HoldsSection(Protocol):
    """A LoadedConfig of config/loading.py."""

    @property
    def section(self) -> Any:
        """The validated "scmoe" section."""


AnyConfig = Union[str, "os.PathLike[str]", Mapping[str, Any], HoldsSection]


def load_deepspeed_json(config: Any) -> dict[str, Any]:
    """The whole DeepSpeed JSON as a dict; refuses duplicate keys, as DeepSpeed does, and names where they are.

    Raises:
        ScMoEConfigError: the file is missing, unreadable, or not a JSON object; or `config` is something else.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ScMoEConfigError(
            f"config is a {type(config).__name__}: hand over the whole DeepSpeed JSON, as a path or as a dict"
        )
    path = Path(config)
    try:
        whole = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
    except OSError as error:
        raise ScMoEConfigError(
            f"{path}: cannot read the DeepSpeed JSON ({error.strerror}); check --deepspeed_config"
        ) from None
    except RecursionError:
        raise ScMoEConfigError(f"{path}: the DeepSpeed JSON is nested too deeply; check the file") from None
    except ValueError as error:  # UnicodeDecodeError among them
        raise ScMoEConfigError(
            f"{path}: not valid JSON ({error}); comments and trailing commas are not allowed"
        ) from None
    if not isinstance(whole, dict):
        raise ScMoEConfigError(f"{path}: the DeepSpeed JSON must be an object, not {type(whole).__name__}")
    if paths := ", ".join(_repeated(whole, "")):
        raise ScMoEConfigError(f"Duplicate keys in the DeepSpeed JSON: {paths}; keep one of each")
    return whole


def at(whole: Any, path: str) -> Any:
    """The value under a path of keys; None where there is none."""
    for key in path.split("."):
        whole = whole.get(key) if isinstance(whole, Mapping) else None
    return whole


def section(whole: Any, path: str) -> Mapping[str, Any]:
    """The object under a path of keys; empty where there is none, or something else in its place."""
    value = at(whole, path)
    return value if isinstance(value, Mapping) else {}


def is_on(whole: Any, path: str) -> bool:
    """Whether the value under a path of keys is true."""
    return at(whole, path) is True


def offloads(whole: Mapping[str, Any], what: str = "offload_optimizer") -> bool:
    """Whether ZeRO keeps the optimizer's state, or "offload_param" the parameters, out of the device's memory."""
    return at(whole, f"zero_optimization.{what}.device") not in (None, "none")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if not repeated:
        return dict(pairs)
    marked = _Repeating(pairs)
    marked.repeated = repeated
    return marked


def _repeated(value: Any, prefix: str) -> Iterator[str]:
    """Paths of the keys that occur several times, in this value and below it."""
    if isinstance(value, _Repeating):
        yield from (prefix + key for key in value.repeated)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from _repeated(each, f"{prefix}{key}.")
