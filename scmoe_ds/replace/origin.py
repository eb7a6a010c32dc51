"""What a Hugging Face model remembers of the directory that it was loaded from, and every checkpoint of it.

DeepSpeed writes a model's `universal_checkpoint_info` into its checkpoints. There is room for what an export needs
later: the class, config.json as it was, which of transformers' conversions the files needed, the directory, for the
files beside the weights, and what the model is adapted with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from scmoe_ds.compat_transformers import used_conversions

CONFIG_FILE = "config.json"
_KEY = "scmoe_hugging_face"
_HOME = "universal_checkpoint_info"

Origin = Mapping[str, Any]
"""class, config (text), conversions (of `used_conversions`), directory (or null), scmoe (or null)."""


class Adapted(NamedTuple):
    """What config.json of an adapted directory says.

    Attributes:
        config: of the trained model that was adapted.
        scmoe: as `modeling_adapted.install` takes it.
    """

    config: Mapping[str, Any]
    scmoe: Mapping[str, Any]


def remember(model: nn.Module, directory: Path | None = None, adapted_from: Adapted | None = None) -> None:
    """Notes where a model comes from, unless it knows already.

    Args:
        directory: that it was loaded from; None: what its config says.
        adapted_from: of an adapted directory; None: it is none.
    """
    whole = dict(getattr(model, _HOME, None) or {})
    if _KEY not in whole and hasattr(getattr(model, "config", None), "to_json_string"):
        found = directory or Path(str(getattr(model.config, "name_or_path", "") or ""))
        whole[_KEY] = origin(model, found, adapted_from)
        setattr(model, _HOME, whole)


def origin(model: Any, directory: Path, adapted_from: Adapted | None = None) -> Origin:
    """The note about a model of a directory with config.json; without one, its config as it is now."""
    file = directory / CONFIG_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else model.config.to_json_string()
    return {
        "class": type(model).__name__,
        "config": text if adapted_from is None else json.dumps(adapted_from.config, indent=2) + "\n",
        "conversions": used_conversions(model),
        "directory": str(directory.resolve()) if file.is_file() else None,
        "scmoe": None if adapted_from is None else dict(adapted_from.scmoe),
    }


def is_converted(note: Origin) -> bool:
    """Whether some layers of a model run as ScMoE, so that its files are those of an adapted one."""
    scmoe = note.get("scmoe")
    return scmoe is not None and (scmoe.get("adapt") or {}).get("layers") != []


def note_settings(model: nn.Module, scmoe: Mapping[str, Any] | None) -> None:
    """Notes what a model is adapted with, now; None: it computes what its class does."""
    whole = dict(getattr(model, _HOME))
    setattr(model, _HOME, {**whole, _KEY: {**whole[_KEY], "scmoe": scmoe}})


def settings_noted(model: nn.Module) -> Mapping[str, Any] | None:
    """What a model was adapted with; None: nothing that it knows of."""
    found: Mapping[str, Any] | None = ((getattr(model, _HOME, None) or {}).get(_KEY) or {}).get("scmoe")
    return found


def origin_of(model: nn.Module) -> Origin:
    """What a model has noted."""
    remember(model)
    return dict(getattr(model, _HOME)[_KEY])


def origin_in(header: Mapping[str, Any]) -> Origin | None:
    """The note in a checkpoint's model file; None: there is none."""
    found = (header.get(_HOME) or {}).get(_KEY)
    return found if isinstance(found, Mapping) else None
