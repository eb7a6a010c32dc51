"""What a Hugging Face model remembers of the directory that it was loaded from, and every checkpoint of it.

DeepSpeed writes a model's `universal_checkpoint_info` into its checkpoints. There is room for what an export needs
later: the class, config.json as it was, which of transformers' conversions the files needed, and the directory, for the
files beside the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from scmoe_ds.compat_transformers import used_conversions

CONFIG_FILE = "config.json"
_KEY = "scmoe_hugging_face"
_HOME = "universal_checkpoint_info"

Origin = Mapping[str, Any]
"""class, config (text), conversions (of `used_conversions`), directory (or null)."""


def remember(model: nn.Module, directory: Path | None = None) -> None:
    """Notes where a model comes from, unless it knows already.

    Args:
        directory: that it was loaded from; None: what its config says.
    """
    whole = dict(getattr(model, _HOME, None) or {})
    if _KEY not in whole and hasattr(getattr(model, "config", None), "to_json_string"):
        whole[_KEY] = origin(model, directory or Path(str(getattr(model.config, "name_or_path", "") or "")))
        setattr(model, _HOME, whole)


def origin(model: Any, directory: Path) -> Origin:
    """The note about a model of a directory with config.json; without one, its config as it is now."""
    file = directory / CONFIG_FILE
    return {
        "class": type(model).__name__,
        "config": file.read_text(encoding="utf-8") if file.is_file() else model.config.to_json_string(),
        "conversions": used_conversions(model),
        "directory": str(directory.resolve()) if file.is_file() else None,
    }


def origin_of(model: nn.Module) -> Origin:
    """What a model has noted."""
    remember(model)
    return dict(getattr(model, _HOME)[_KEY])


def origin_in(header: Mapping[str, Any]) -> Origin | None:
    """The note in a checkpoint's model file; None: there is none."""
    found = (header.get(_HOME) or {}).get(_KEY)
    return found if isinstance(found, Mapping) else None
