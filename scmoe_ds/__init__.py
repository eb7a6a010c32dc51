"""Shortcut-connected mixture-of-experts (ScMoE, arXiv 2404.05019) for DeepSpeed.

A model of your own that holds DeepSpeed's MoE layers, with one word in its DeepSpeed JSON, "scmoe": {"replace": true}:

    engine, optimizer, loader, scheduler = scmoe_ds.initialize(model=model, config="ds.json")

initialize                     as deepspeed.initialize, for models with ScMoE layers
ScMoE                          the layer: deepspeed.moe.layer.MoE whose routed experts read a preceding layer
ScMoEConfig, RouterConfig      the "scmoe" section of the JSON; its "router"
Schedule                       when the routed experts run
from_pretrained                a Hugging Face MoE model for AutoEP, with this rank's experts alone
save_pretrained                an engine's weights as transformers reads them, with all ranks' experts
replace_moe_layers             DeepSpeed's MoE layers of a model become ScMoE layers; undo_replacement puts them back
moe_from_dense                 MLPs of a dense model become MoE layers; load_balancing_loss is their loss
ScMoECallback, prepare         Hugging Face's Trainer and Accelerate, with what the section says
connect, parameter_groups      for loops of your own: join the process group; what weight decay applies to
ScMoEConfigError               a setting to correct; all errors are in scmoe_ds.errors

The log is logging.getLogger("scmoe_ds"). Names are imported when they are first used: torch and DeepSpeed take seconds,
and `scmoe --help` and `scmoe plan` need neither, not even installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scmoe_ds.config.unread_section import watch_engines

if TYPE_CHECKING:
    from scmoe_ds.checkpoint.autoep.loading import from_pretrained
    from scmoe_ds.checkpoint.autoep.saving import save_pretrained
    from scmoe_ds.config.router_section import RouterConfig
    from scmoe_ds.config.section import ScMoEConfig
    from scmoe_ds.engine import connect, initialize, parameter_groups
    from scmoe_ds.engine.take_over import prepare
    from scmoe_ds.errors import ScMoEConfigError
    from scmoe_ds.moe.shortcut import ScMoE
    from scmoe_ds.overlap.schedule import Schedule
    from scmoe_ds.replace import load_balancing_loss, moe_from_dense, replace_moe_layers, undo_replacement
    from scmoe_ds.training.trainer_callback import ScMoECallback

_HOME = {
    "RouterConfig": "config.router_section",
    "ScMoE": "moe.shortcut",
    "ScMoECallback": "training.trainer_callback",
    "ScMoEConfig": "config.section",
    "ScMoEConfigError": "errors",
    "Schedule": "overlap.schedule",
    "connect": "engine",
    "from_pretrained": "checkpoint.autoep.loading",
    "initialize": "engine",
    "load_balancing_loss": "replace",
    "moe_from_dense": "replace",
    "parameter_groups": "engine",
    "prepare": "engine.take_over",
    "replace_moe_layers": "replace",
    "save_pretrained": "checkpoint.autoep.saving",
    "undo_replacement": "replace",
}

_WITHOUT_DEEPSPEED = ("Schedule", "ScMoEConfigError")

__version__ = "0.1.0"

__all__ = [
    "RouterConfig",
    "ScMoE",
    "ScMoECallback",
    "ScMoEConfig",
    "ScMoEConfigError",
    "Schedule",
    "connect",
    "from_pretrained",
    "initialize",
    "load_balancing_loss",
    "moe_from_dense",
    "parameter_groups",
    "prepare",
    "replace_moe_layers",
    "save_pretrained",
    "undo_replacement",
]


def __getattr__(name: str) -> Any:
    if name == "engine":
        return import_module("scmoe_ds.engine")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _WITHOUT_DEEPSPEED:
        import_module("scmoe_ds.deepspeed_version")
    return getattr(import_module(f"scmoe_ds.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch_engines()
