"""Shortcut-connected mixture-of-experts (ScMoE, arXiv 2404.05019) for DeepSpeed."""

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.initialize import initialize
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.shortcut import ScMoE
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace import load_balancing_loss, moe_from_dense, replace_moe_layers, undo_replacement

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
