"""Progressive conversion: one MoE layer more every N optimizer steps (`scmoe.adapt.convert_every`).

Before each training pass the steps that the engine has made say how many layers are converted, so that a resumed run
goes on with as many, and so does an evaluation of what was loaded. Validations run what the last training pass ran.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scmoe_ds.config.adapt_section import AdaptConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.schedule_text import layers_text


def convert_stepwise(engine: Any, conversion: Conversion, section: ScMoEConfig) -> None:
    """Starts with one layer, if the section asks for it: the first of `adapt.layers`, or the model's last one."""
    adapt = section.adapt
    if adapt is None or not adapt.convert_every or not conversion.numbers:
        return
    steps = _Steps(engine, conversion, adapt)
    steps.convert()
    engine.module.register_forward_pre_hook(steps.before, prepend=True)
    load = engine.load_checkpoint

    def load_and_convert(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        steps.convert()
        return result

    engine.load_checkpoint = load_and_convert


class _Steps:
    def __init__(self, engine: Any, conversion: Conversion, adapt: AdaptConfig) -> None:
        self._engine, self._conversion, self._adapt = engine, conversion, adapt

    def before(self, module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self.convert()

    def convert(self) -> None:
        number = len(self._conversion.numbers)
        now = self._adapt.converted_after(self._engine.global_steps, number)
        if now == self._conversion.converted:
            return
        self._conversion.only(now)
        # The times of pairs that do not run cannot be measured. All ranks count the same steps.
        self._engine.overlap.waits = len(now) < number
        log(f"conversion: MoE layer {layers_text(now)} of {number} to convert run as ScMoE")
