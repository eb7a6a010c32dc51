"""Writes the numbers of paper figure 9 to DeepSpeed's monitors while a model trains."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from scmoe_ds.analysis.gating import SCALARS, GatingSumsOfModel, gate_layers
from scmoe_ds.analysis.probes import Capture


class GatingMonitor:
    """Writes `Gating/block_<number>/<scalar>` every `interval` optimizer steps, against the samples so far.

    In such a step hooks measure the forward passes of all micro-batches on all ranks. The last pass adds one all-reduce
    and writes. In other steps the hooks do nothing. The scalars are those of `scmoe_ds.analysis.gating`; "drop_rate" is
    at the capacity of training.

    Args:
        engine: of `scmoe_ds.initialize`; its module is a GPT of this package.
        interval: optimizer steps, at least 1; every rank gives the same.

    Raises:
        AnalysisError: the model has no gates.
    """

    def __init__(self, engine: Any, interval: int) -> None:
        self.engine, self.interval = engine, interval
        self._layers = gate_layers(engine.module, engine.module.config)
        self._sums: GatingSumsOfModel | None = None
        self._capture: Capture | None = None
        self._handles = [
            engine.module.register_forward_pre_hook(self._before),
            engine.module.register_forward_hook(self._after),
        ]

    def detach(self) -> None:
        """Removes all hooks."""
        self._close()
        for handle in self._handles:
            handle.remove()

    def _before(self, module: Any, args: Any) -> None:
        self._close()  # of a pass that failed
        if not module.training or (self.engine.global_steps + 1) % self.interval:
            return
        if self._sums is None:
            self._sums = GatingSumsOfModel(self._layers)
        self._capture = Capture(self._sums.probes)
        self._capture.__enter__()

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self._capture is None:
            return
        assert self._sums is not None
        self._sums.add(self._capture)
        self._close()
        if self.engine.is_gradient_accumulation_boundary():
            sums, self._sums = self._sums, None
            self._write(sums)

    def _close(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.__exit__(None, None, None)

    def _write(self, sums: GatingSumsOfModel) -> None:
        joint = torch.cat([layer.values for layer in sums.layers])
        # Tensor-parallel ranks count the same tokens each: means and shares do not change.
        dist.all_reduce(joint)
        for layer, values in zip(sums.layers, joint.split([len(layer.values) for layer in sums.layers]), strict=True):
            layer.values = values
        if not self.engine.monitor.enabled or dist.get_rank() != 0:
            return
        samples = self.engine.global_samples + self.engine.train_batch_size()  # after this step
        events = []
        for record in (layer.record() for layer in sums.layers):
            events += [(f"Gating/block_{record['block']}/{name}", record[name], samples) for name in SCALARS]
        self.engine.monitor.write_events(events)
