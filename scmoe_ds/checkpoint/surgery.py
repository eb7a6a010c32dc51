"""Surgery: the weights of a trained MoE model become those of a ScMoE, one parameter at a time, when it is read.

Gate, experts and all dense layers keep their weights and names. What a converted layer has more:

    shortcut norm    starts as a copy of the norm before the MoE, whose scale the routed experts know (`copied_norm`)
    shared expert    the source's; of a source without one the mean of the layer's experts, or the busiest of them, or
                     fitted (scmoe_ds.training.expert_fit)
    coefficient      see scmoe_ds.moe.merge_start
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from scmoe_ds.checkpoint.reshard import Weights
from scmoe_ds.config.adapt_section import base_of
from scmoe_ds.config.names import Merge
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.pairs import tap_of
from scmoe_ds.moe.merge_start import FITTED_SHARE, SHARE, start_of_merge


class _Made(NamedTuple):
    """A parameter of the ScMoE: its shape, and what reads or makes it."""

    shape: Sequence[int]
    read: Callable[[], Tensor]


class Surgery:
    """The whole parameters of a ScMoE out of its source's; a `reshard.Weights`.

    Args:
        source: whole parameters of the trained model.
        settings: its shape.
        old: its section.
        config: the ScMoE's. Layers that are not converted keep all of their parameters.
        busiest: for each MoE layer, the expert that becomes the shared one; None: their mean does.
        fitted: parameters of shared experts that were fitted to a text, by name; the others are as of the mean. None:
            there are none, and a new shared expert has a small weight.
    """

    def __init__(
        self,
        source: Weights,
        settings: GPTSettings,
        old: ScMoEConfig,
        config: ScMoEConfig,
        busiest: Sequence[int] | None = None,
        fitted: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.path, self._source, self._config, self._busiest = source.path, source, config, busiest
        self._share = SHARE if fitted is None else FITTED_SHARE[config.merge]
        self._width, self._names = settings.hidden_size, source.names()
        base = base_of(old)
        self._before: Merge | None = None if base.architecture == "pipelined_topk" else base.merge
        self._made = {name: self._copy(name) for name in self._names}
        for layer in range(config.moe_layers(settings.num_layers)):
            if config.of_layer(layer).has_shortcut:
                self._convert(layer)
        for name, value in (fitted or {}).items():
            self._made[name] = _Made(value.shape, value.clone)

    def names(self) -> list[str]:
        return sorted(self._made)

    def shape(self, name: str) -> Sequence[int]:
        return self._made[name].shape

    def read(self, name: str) -> Tensor:
        return self._made[name].read()

    def _copy(self, name: str) -> _Made:
        return _Made(self._source.shape(name), partial(self._source.read, name))

    def _convert(self, layer: int) -> None:
        pair, moe = f"runs.{layer}.", f"runs.{layer}.blocks.{self._config.moe_every - 1}.moe."
        if self._config.shortcut_norm == "own":
            position = (self._config.first_layer_position if layer == 0 else None) or self._config.position
            norm = copied_norm(self._config, layer, position)
            for part in self._parts_of(norm):
                self._made[f"{pair}shortcut_norm.{part}"] = self._copy(norm + part)
        if self._before is None:
            self._make_shared_expert(layer, moe)
        self._make_coefficient(moe)

    def _parts_of(self, prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in self._names if name.startswith(prefix)]

    def _make_shared_expert(self, layer: int, moe: str) -> None:
        experts = f"{moe}deepspeed_moe.experts.deepspeed_experts."
        everyone = range(self._config.experts_of(layer))
        chosen = list(everyone) if self._busiest is None else [self._busiest[layer]]
        for part in self._parts_of(f"{experts}0."):
            scale = self._share if self._config.merge == "add" and part.startswith("output.") else 1.0
            names = [f"{experts}{number}.{part}" for number in chosen]
            self._made[f"{moe}mlp.{part}"] = _Made(self._source.shape(names[0]), partial(self._mean, names, scale))

    def _mean(self, names: Sequence[str], scale: float) -> Tensor:
        total = self._source.read(names[0]).float()
        for name in names[1:]:
            total = total + self._source.read(name).float()
        return total * (scale / len(names))

    def _make_coefficient(self, moe: str) -> None:
        merge, before = self._config.merge, self._before
        if merge == before:
            return
        adapt = self._config.adapt
        old = {part: self._made.pop(f"{moe}coefficient.{part}") for part in self._parts_of(f"{moe}coefficient.")}
        if adapt is not None and adapt.base is not None and adapt.base.keeps_coefficient(merge):
            self._made |= {f"{moe}base_coefficient.{part}": made for part, made in old.items()}

        network = (old["weight"].read(), old["bias"].read()) if old else None
        first = start_of_merge(merge, before, network, self._width, self._share)
        if first is not None:
            for part, value in zip(("weight", "bias"), first, strict=True):
                self._made[f"{moe}coefficient.{part}"] = _Made(value.shape, value.clone)


def copied_norm(config: ScMoEConfig, layer: int, position: str) -> str:
    """The prefix of the names of the norm that a shortcut norm starts as, e.g. "runs.0.blocks.1.mlp_norm.".

    Pos-1 and Pos-2 take the norm before the MoE. At Pos-3, an operator farther away, the norm of the tap is nearer: of
    two top-2 GPTs the losses right after surgery were 3.20 and 3.24 (else 3.22, 3.25) at Pos-1, 3.54 and 3.55 (else
    3.79, 3.85) at Pos-2, 3.52 and 3.54 (else 4.06, 4.05) at Pos-3, with 3.16 and 3.17 before.
    """
    if position != "pos3":
        return f"runs.{layer}.blocks.{config.moe_every - 1}.mlp_norm."
    return f"runs.{layer}.blocks.{tap_of(config, position) // 2}.attention_norm."
