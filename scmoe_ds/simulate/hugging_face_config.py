"""Values of a config.json, each checked where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scmoe_ds.errors import ModelError
from scmoe_ds.simulate.json_files import finding
from scmoe_ds.simulate.model import MOST, MOST_LAYERS


class Config:
    """A config.json and where it is from."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def count(self, *keys: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number under the first of these keys that there is.

        Raises:
            ModelError: none and no default, or no such number.
        """
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise self.error(key, f"must be a whole number of at least {least}")
            if value > most:
                raise self.error(key, f"must be at most {most}")
            return value
        if default is None:
            raise ModelError(f"{self.source}: {keys[0]}: is missing; add it")
        return default

    def error(self, key: str, rule: str) -> ModelError:
        """What breaks a rule, with its value."""
        return ModelError(f"{self.source}: {finding(key, self.values.get(key), rule)}")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    @property
    def hidden(self) -> int:
        return self.count("hidden_size")

    @property
    def layers(self) -> int:
        return self.count("num_hidden_layers", "num_layers", most=MOST_LAYERS)

    @property
    def vocabulary(self) -> int:
        return self.count("vocab_size")
