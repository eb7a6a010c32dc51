"""A DeepSpeed JSON from its file to settings: read once, validated once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

from scmoe_ds.config.deepspeed_json import load_deepspeed_json
from scmoe_ds.config.section import ScMoEConfig


@dataclass(frozen=True)
class LoadedConfig:
    """A DeepSpeed JSON that is known to be valid.

    Attributes:
        whole: DeepSpeed's keys and the section, as they are in the JSON.
        section: the "scmoe" section.
    """

    whole: Mapping[str, Any]
    section: ScMoEConfig

    def in_world(self, ranks: int, tensor_parallel: int = 1) -> LoadedConfig:
        """The same for so many ranks: `ScMoEConfig.over_tensor_parallel`. Raises a ScMoEConfigError for a section that
        does not fit their number."""
        self.section.check_world(ranks, tensor_parallel)
        return replace(self, section=self.section.over_tensor_parallel(tensor_parallel))


Source = Union[str, "os.PathLike[str]", Mapping[str, Any], LoadedConfig]
"""A path, the parsed JSON, or what `load` has made of it."""


def load(source: Source) -> LoadedConfig:
    """Reads and validates a DeepSpeed JSON; what is validated already stays as it is.

    Raises:
        ScMoEConfigError: as `ScMoEConfig.from_deepspeed`.
    """
    if isinstance(source, LoadedConfig):
        return source
    whole = load_deepspeed_json(source)
    return LoadedConfig(whole, ScMoEConfig.from_deepspeed(whole))
