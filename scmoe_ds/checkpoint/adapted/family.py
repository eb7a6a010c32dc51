"""What transformers needs of an adapted directory: config.json, and one file with the model's classes.

The model's type is that of its source behind "scmoe_". So transformers asks for `trust_remote_code`, where it would
otherwise load the source's class, which computes another function of the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scmoe_ds.replace import modeling_adapted

MODELING_FILE = Path(modeling_adapted.__file__).name
PREFIX = "scmoe_"
_CONFIG, _MODEL = "AdaptedConfig", "AdaptedForCausalLM"
_CLASSES = """

# The rest is of this directory: the classes that its config.json names.
from transformers import {config}, {model}  # noqa: E402


class AdaptedConfig({config}):
    model_type = "{own_type}"


class AdaptedForCausalLM({model}):
    config_class = AdaptedConfig

    def __init__(self, config):
        super().__init__(config)
        install(self, config.scmoe)


load_names_as("{own_type}", "{model_type}")
"""


def is_adapted(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of an adapted model of Hugging Face."""
    return str(config.get("model_type")).startswith(PREFIX) and isinstance(config.get("scmoe"), Mapping)


def adapted_config(source: Mapping[str, Any], scmoe: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of an adapted model.

    Args:
        source: the trained model's config.json.
        scmoe: as `modeling_adapted.install` takes it.
    """
    module = MODELING_FILE.removesuffix(".py")
    return {
        **source,
        "architectures": [_MODEL],
        "auto_map": {"AutoConfig": f"{module}.{_CONFIG}", "AutoModelForCausalLM": f"{module}.{_MODEL}"},
        "model_type": PREFIX + source["model_type"],
        "scmoe": dict(scmoe),
    }


def source_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the trained model of which an adapted one was made, without the name of its class."""
    left_out = ("architectures", "auto_map", "scmoe")
    found = {key: value for key, value in config.items() if key not in left_out}
    return {**found, "model_type": str(config["model_type"]).removeprefix(PREFIX)}


def modeling_file(model: Any) -> str:
    """The file with the classes.

    Args:
        model: of the trained model's class, on any device.
    """
    names = {"config": type(model.config).__name__, "model": type(model).__name__}
    own_type = PREFIX + model.config.model_type
    classes = _CLASSES.format(**names, own_type=own_type, model_type=model.config.model_type)
    return Path(modeling_adapted.__file__).read_text(encoding="utf-8") + classes
