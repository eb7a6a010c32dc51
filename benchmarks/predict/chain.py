"""From a setting's names to a simulated step: the chain of `scmoe_ds.simulate`, as `scmoe plan` runs it."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.predict.unfused import unfused
from scmoe_ds.programs.plan_model import model_of_preset
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.machine import Machine
from scmoe_ds.simulate.method import Method
from scmoe_ds.simulate.model import Model
from scmoe_ds.simulate.price import price
from scmoe_ds.simulate.routing import Routing
from scmoe_ds.simulate.settings import read_settings
from scmoe_ds.simulate.step_work import step_work
from scmoe_ds.simulate.times import StepTimes
from scmoe_ds.simulate.work import StepWork

CLUSTERS = Path(__file__).parents[2] / "clusters"
CONFIGS = Path(__file__).parents[2] / "ds_configs"


@functools.cache
def work_of(model: Model, method: Method, layout: Layout, old_attention: bool = False) -> StepWork:
    """The work does not depend on the machine, so a fit counts it once."""
    work = step_work(model, method, layout)
    return unfused(work, model) if old_attention else work


def times_of(
    model: Model, method: Method, layout: Layout, machine: Machine, routing: Routing, old_attention: bool = False
) -> StepTimes:
    """All parts of the step, milliseconds."""
    return price(work_of(model, method, layout, old_attention), layout, machine, routing)


def setting_of(preset: str, config: Path, world: int) -> tuple[Model, Method, Layout]:
    """A preset and a file of ds_configs/ as model, method and layout."""
    settings = read_settings(config, world)
    assert settings.method is not None
    return model_of_preset(preset, settings.section), settings.method, settings.layout
