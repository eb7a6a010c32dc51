"""What a step of a model with DeepSpeed's AutoEP layers consists of, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.parts import CPU, LAYER, mark_module, timed_all_to_alls
from scmoe_ds.trace.recorder import Recorder, Span

Step = Callable[[], None]


def autoep_layers(model: nn.Module) -> list[AutoEPMoELayer]:
    """The model's MoE layers, DeepSpeed's or those that the package made of them."""
    return [each for each in model.modules() if isinstance(each, AutoEPMoELayer)]


def record_layers(model: nn.Module, step: Step, count: int) -> list[list[Span]]:
    """The spans of AutoEP's layers and of their all-to-alls in each of `count` steps."""
    found = []
    for _ in range(count):
        dist.barrier()
        recorder = Recorder(CPU)
        hooks: list[Any] = []
        for number, layer in enumerate(autoep_layers(model)):
            hooks += mark_module(layer, LAYER, recorder.pair(number))
        try:
            with timed_all_to_alls(recorder):
                step()
        finally:
            for hook in hooks:
                hook.remove()
        found.append(recorder.spans())
    return found


def peak_bytes(step: Step) -> int:
    """Most bytes that one step holds at once beyond what was there before it, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    held = most = 0
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
