"""Shortcut-connected mixture-of-experts (ScMoE, arXiv 2404.05019) for DeepSpeed.

Names are imported when they are first used: torch and DeepSpeed take seconds, and `scmoe --help` needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scmoe_ds.config.section import ScMoEConfig
    from scmoe_ds.engine import initialize
    from scmoe_ds.errors import ScMoEConfigError
    from scmoe_ds.moe.shortcut import ScMoE
    from scmoe_ds.overlap.schedule import Schedule
    from scmoe_ds.replace import load_balancing_loss, moe_from_dense, replace_moe_layers, undo_replacement

_HOME = {
    "ScMoE": "moe.shortcut",
    "ScMoEConfig": "config.section",
    "ScMoEConfigError": "errors",
    "Schedule": "overlap.schedule",
    "initialize": "engine",
    "load_balancing_loss": "replace",
    "moe_from_dense": "replace",
    "replace_moe_layers": "replace",
    "undo_replacement": "replace",
}

__version__ = "0.1.0"

__all__ = [
    "ScMoE",
    "ScMoEConfig",
    "ScMoEConfigError",
    "Schedule",
    "initialize",
    "load_balancing_loss",
    "moe_from_dense",
    "replace_moe_layers",
    "undo_replacement",
]


def __getattr__(name: str) -> Any:
    if name == "engine":
        return import_module("scmoe_ds.engine")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"scmoe_ds.{_HOME[name]}"), name)
