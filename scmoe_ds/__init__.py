"""Shortcut-connected mixture-of-experts (ScMoE, arXiv 2404.05019) for DeepSpeed."""

from scmoe_ds.config import ScMoEConfig, ScMoEConfigError
from scmoe_ds.engine import initialize
from scmoe_ds.moe.layer import ScMoE
from scmoe_ds.overlap.schedule import Schedule

__all__ = ["ScMoE", "ScMoEConfig", "ScMoEConfigError", "Schedule", "initialize"]
