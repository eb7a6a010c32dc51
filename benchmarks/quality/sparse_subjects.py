"""The models of benchmarks.quality.sparse on the run-time path, with thresholds that can be changed between passes.

Shape suffixes: E experts, F neurons of an expert.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scmoe_ds
from benchmarks.quality.adapt_hf import deepspeed_json
from benchmarks.quality.adapt_hf import sequence_losses as losses_of_hugging_face
from benchmarks.quality.run import sequence_losses
from scmoe_ds.checkpoint.adapted.text import trained_model
from scmoe_ds.checkpoint.export import open_weights, write_export
from scmoe_ds.evaluation.windows import Row
from scmoe_ds.inference.attachment import moe_layers
from scmoe_ds.inference.dropping import Dropped, Dropping, attach_dropping, drop_experts
from scmoe_ds.inference.load import load_trained
from scmoe_ds.moe.decisions.dropping import Thresholds
from scmoe_ds.sparse.hugging_face_layers import fused_layers, write_directory
from scmoe_ds.sparse.own_layers import SortedWeights
from scmoe_ds.sparse.sparsity_file import LayerCurve, Method, Sparsity, digest_of

_TOGETHER = 16
_ANY_RATE = 0.25


@dataclass(frozen=True)
class Subject:
    """A sparsified model that drops.

    Attributes:
        layers: its MoE layers, with a routing rule each.
        losses: of sequences, nats per token, as the rules are.
        dropped: counts what is left out.
        sparsity: of its directory.
    """

    layers: Sequence[Any]
    losses: Callable[[Sequence[Row]], list[float]]
    dropped: Dropped
    sparsity: Sparsity

    def drop(self, thresholds: Sequence[tuple[float, float]]) -> None:
        """From now on by these thresholds of each layer."""
        for layer, each in zip(self.layers, thresholds, strict=True):
            layer.routing_rule.thresholds = Thresholds(*each)
        self.dropped.reset()


def opened(directory: Path, is_hugging_face: bool) -> Subject:
    """What `scmoe sparsify` has written, ready for 2T-Drop, of which 1T-Drop is the case of equal thresholds."""
    sparsity = Sparsity.read(directory)
    if not is_hugging_face:
        loaded = load_trained(directory, dtype="fp32")
        dropped = drop_experts(loaded, Dropping(_ANY_RATE, "2t"))
        assert dropped is not None
        layers = list(moe_layers(loaded.model).values())
        return Subject(layers, lambda rows: sequence_losses(loaded.model, rows, _TOGETHER), dropped, sparsity)
    config = deepspeed_json(_TOGETHER, 1, 1, 1e-3)
    config |= {"expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": "qwen3_moe"}}
    config |= {"scmoe": {"overlap": {"num_chunks": 1, "calibration_steps": 0}}}
    engine, *_ = scmoe_ds.initialize(model=scmoe_ds.from_pretrained(directory, config), config=config)
    model = engine.module
    dropped = attach_dropping(model, sparsity, _ANY_RATE, "2t")
    layers = list(moe_layers(model).values())
    return Subject(layers, lambda rows: losses_of_hugging_face(model, rows, _TOGETHER), dropped, sparsity)


def with_spread(sparsity: Sparsity, spread: float) -> Sparsity:
    """The same calibration with another spread of 2T-Drop."""
    return sparsity.model_copy(
        update={"spread": spread, "layers": tuple(_with_spread(layer, spread) for layer in sparsity.layers)}
    )


def _with_spread(layer: LayerCurve, spread: float) -> LayerCurve:
    points = sorted({each + by for each in layer.threshold for by in (-spread, 0.0, spread)})
    rate_1t = tuple(layer.rate(each, "1t") for each in points)
    rate_2t = tuple((layer.rate(each - spread, "1t") + layer.rate(each + spread, "1t")) / 2 for each in points)
    return LayerCurve(name=layer.name, threshold=tuple(points), rate_1t=rate_1t, rate_2t=rate_2t)


def shuffle(source: Path, out: Path, is_hugging_face: bool, seed: int) -> None:
    """The control: the same model and thresholds, but major halves are neurons by chance."""
    sparsity = Sparsity.read(source)
    generator = torch.Generator().manual_seed(seed)

    def order_EF(experts: int, neurons: int) -> Tensor:
        return torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])

    if is_hugging_face:
        model = trained_model(source)
        layers = fused_layers(model, str(source))
        for layer in layers:
            layer.sort(order_EF(len(layer.sums().rows), layer.neurons))
        write_directory(model, source, out, _of_neurons(sparsity, [layer.input_FD for layer in layers]))
        return
    weights, description = open_weights(source)
    order, first = {}, "deepspeed_moe.experts.deepspeed_experts.0"
    for curve in sparsity.layers:
        experts = weights.shape(f"{curve.name}.deepspeed_moe.gate.wg.weight")[0]
        order[curve.name] = order_EF(experts, weights.shape(f"{curve.name}.{first}.output.weight")[1])
    shuffled = SortedWeights(weights, order, bool(description["gpt"].get("swiglu")))
    write_export(out, shuffled, description)
    _of_neurons(sparsity, [shuffled.read(f"{name}.{first}.input.weight") for name in order]).write(out)


def _of_neurons(sparsity: Sparsity, inputs: Sequence[Tensor]) -> Sparsity:
    """The same thresholds, said of other halves."""
    return sparsity.model_copy(update={"neurons": digest_of(inputs)})


def thresholds_of(sparsity: Sparsity, rate: float, method: Method, spread: float | None) -> list[tuple[float, float]]:
    """Of each layer; a spread of None is the file's."""
    found = sparsity if spread is None else with_spread(sparsity, spread)
    return found.thresholds(rate, method)


def emptied(directory: Path) -> Path:
    """A directory that is not there."""
    shutil.rmtree(directory, ignore_errors=True)
    return directory
