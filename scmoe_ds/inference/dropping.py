"""A loaded model leaves out routed experts that hardly matter for a token (DualSparse-MoE, arXiv 2508.18376).

The thresholds of a wanted rate come from sparsity.json, which `scmoe sparsify` writes beside the weights. What was
really left out is counted: another text than the calibration's has other scores. Load-aware thresholds
(moe/decisions/load_aware.py) keep to the rate in each step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

from torch import nn

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.attachment import (
    DROPS,
    HALVES,
    LOAD_AWARE,
    Attachment,
    Place,
    check,
    moe_layers,
    place_of_experts,
)
from scmoe_ds.inference.droppable import check_scores, digests_of, top_k_of
from scmoe_ds.inference.load import Loaded
from scmoe_ds.moe.decisions.dropping import DropRule, Places, Thresholds
from scmoe_ds.moe.decisions.halves import HalvedExperts, HalvedGroups
from scmoe_ds.moe.decisions.load_aware import Levels, LoadAwareRule
from scmoe_ds.moe.decisions.partition import parts_of, whole_experts
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.parallel.agreement import gather, run_together
from scmoe_ds.sparse.sparsity_file import FILE, Method, Sparsity, digest_of

_Rule = Union[DropRule, LoadAwareRule]
LEVELS = 12
"""Of load-aware thresholds. A notice has as many counts for each place: 2 KB to each of 8 ranks for 8 local experts and
2T-Drop. Between two levels lie 4.5 % of the computation at a rate of 25 %."""


@dataclass(frozen=True)
class Dropping:
    """What is asked for.

    Attributes:
        rate: share of the routed experts' computation to leave out, in (0, 1); None: the one that sparsity.json names.
        method: "1t" or "2t"; None: "2t" where the experts' neurons are sorted.
        load_aware: thresholds follow the loads of the expert-parallel ranks.
    """

    rate: float | None = None
    method: Method | None = None
    load_aware: bool = False


@dataclass(frozen=True)
class Shares:
    """What was left out, of all choices of all tokens on all ranks.

    Attributes:
        skipped: not computed.
        halved: computed by the major half alone.
    """

    skipped: float
    halved: float

    @property
    def dropped(self) -> float:
        """Of the routed experts' computation."""
        return self.skipped + self.halved / 2

    def record(self) -> dict[str, float]:
        """All numbers by name."""
        return {"dropped": self.dropped, "skipped": self.skipped, "halved": self.halved}

    def __str__(self) -> str:
        return (
            f"{self.dropped:.1%} of the routed experts' computation left out: {self.skipped:.1%} of the rows skipped, "
            f"{self.halved:.1%} halved"
        )


class Dropped(Attachment):
    """A model that drops.

    Attributes:
        rate: asked for.
        method: "1t" or "2t".
        load_aware: whether thresholds follow the loads.
    """

    def __init__(
        self, rate: float, method: Method, load_aware: bool, places: Sequence[Place], rules: Sequence[_Rule]
    ) -> None:
        super().__init__(places)
        self.rate, self.method, self.load_aware, self._rules = rate, method, load_aware, rules

    def __str__(self) -> str:
        kind = "2T-Drop" if self.method == "2t" else "1T-Drop"
        return f"{kind}{' with load-aware thresholds' if self.load_aware else ''} at a rate of {self.rate:g}"

    def shares(self) -> Shares:
        """What was left out since the rule was attached, or the last `reset`. Collective over the world; the host waits
        for a GPU."""
        own = [each.counts.read() for each in self._rules]
        choices, whole, major = (sum(each) for each in zip(*[row for part in gather(own) for row in part], strict=True))
        return Shares((choices - whole - major) / max(choices, 1), major / max(choices, 1))

    def reset(self) -> None:
        """Counts from zero."""
        for each in self._rules:
            each.counts.reset()


def drop_experts(loaded: Loaded, asked: Dropping | None) -> Dropped | None:
    """From now on a loaded model leaves out what is asked for. Collective over the world.

    Args:
        asked: None: whatever rate sparsity.json names, and nothing where there is no such file.

    Returns:
        None: nothing is left out.

    Raises:
        ArgumentError: a rate out of range, none at all, or a model, ranks or experts for which it does not hold.
        CheckpointError: no sparsity.json, a damaged one, or one of another checkpoint.
    """
    path = loaded.trained.path
    # Also where the name is there, but no file: the caller would take all for the wanted rate otherwise.
    if asked is None and not run_together(lambda: os.path.lexists(path / FILE)):
        return None
    sparsity = run_together(lambda: _sparsity(loaded))
    asked = asked or Dropping()
    rate = sparsity.rate if asked.rate is None else asked.rate
    method = asked.method or ("2t" if sparsity.is_sorted else "1t")
    if rate is None:
        if asked == Dropping():
            return None
        raise ArgumentError(f"--drop-rate: is missing, and {path / FILE} names none; give one, such as 0.25")
    return _drop(list(moe_layers(loaded.model).values()), sparsity, rate, method, asked.load_aware)


def _sparsity(loaded: Loaded) -> Sparsity:
    sparsity, weights = Sparsity.read(loaded.trained.path), loaded.trained.weights
    # As they were saved: the model's own may have been rounded to another dtype, or lie on other ranks.
    layers, inputs = moe_layers(loaded.model), "deepspeed_moe.experts.deepspeed_experts.0.input.weight"
    gates = digest_of(weights.read(f"{name}.deepspeed_moe.gate.wg.weight") for name in layers)
    neurons = digest_of(weights.read(f"{name}.{inputs}") for name in layers)
    sparsity.check(f"--load {loaded.trained.path}", gates, neurons, top_k_of(list(layers.values())))
    return sparsity


def attach_dropping(
    model: nn.Module, sparsity: Sparsity, rate: float, method: Method, load_aware: bool = False
) -> Dropped:
    """From now on a model in memory leaves out routed experts that hardly matter, in evaluation mode. Collective over
    the world.

    Args:
        model: a GPT of this package, or a Hugging Face model whose MoE layers `scmoe_ds.initialize` has attached.
        sparsity: what `scmoe sparsify` wrote beside the weights that the model has, in fp32 or as a bf16 copy.
        rate: share of the routed experts' computation to leave out, between 0 and 1.
        method: "1t" skips choices; "2t" also computes some with half of their expert.
        load_aware: expert-parallel ranks with fewer rows leave out less.

    Returns:
        a handle: `shares()` says what was left out.

    Raises:
        ArgumentError: a rate out of range, or a model, ranks or experts for which it does not hold.
        CheckpointError: the thresholds are those of other weights.
    """
    layers = list(moe_layers(model).values())
    gates, neurons = digests_of(layers)
    run_together(lambda: sparsity.check("the model", gates, neurons, top_k_of(layers)))
    return _drop(layers, sparsity, rate, method, load_aware)


def _drop(layers: Sequence[Any], sparsity: Sparsity, rate: float, method: Method, load_aware: bool) -> Dropped:
    rates = level_rates(rate)[1:] if load_aware else [rate]
    of_layers = list(zip(*(_thresholds(sparsity, each, method) for each in rates), strict=True))
    if len(layers) != len(of_layers):
        raise ArgumentError(
            f"{FILE}: has thresholds of {len(of_layers)} layers, the model has {len(layers)} MoE layers; make it anew "
            "with scmoe sparsify"
        )
    wanted = [DROPS] + [HALVES] * (method == "2t") + [LOAD_AWARE] * load_aware
    check(layers, wanted, "--drop-load-aware" if load_aware else f"--drop-method {method}")
    for layer in layers:
        check_scores(layer)
    rules: list[_Rule] = []
    for layer, thresholds in zip(layers, of_layers, strict=True):
        where = Places(whole_experts(layer) * parts_of(layer) // layer.ep_size, 2 if method == "2t" else 1)
        device = next(layer.parameters()).device
        if load_aware:
            levels = Levels([Thresholds(0.0, 0.0), *thresholds], rate)
            rules.append(LoadAwareRule(levels, where, device))
        else:
            rules.append(DropRule(thresholds[0], where, device))
    name = "early_rule" if load_aware else "routing_rule"
    places: list[Place] = [(layer, name, rule) for layer, rule in zip(layers, rules, strict=True)]
    if method == "2t":
        places += [(*place_of_experts(layer), _halved(layer)) for layer in layers]
    return Dropped(rate, method, load_aware, places, rules)


def level_rates(rate: float) -> list[float]:
    """The rates of load-aware levels: from nothing to twice the wanted rate, or half of the way to everything. A rank
    drops more only where loads are very uneven."""
    highest = min(2 * rate, (1 + rate) / 2)
    return [highest * number / (LEVELS - 1) for number in range(LEVELS)]


def _thresholds(sparsity: Sparsity, rate: float, method: Method) -> list[Thresholds]:
    # No criterion is below 0, and T minus the spread may be.
    return [Thresholds(max(skip, 0.0), max(halve, 0.0)) for skip, halve in sparsity.thresholds(rate, method)]


def _halved(layer: Any) -> HalvedExperts | HalvedGroups:
    try:
        if isinstance(layer, StagedMoE):
            return HalvedExperts(layer.deepspeed_moe.experts)
        return HalvedGroups(layer.experts)
    except ValueError as error:
        raise ArgumentError(f"--drop-method 2t: {error}, or --no-drop") from None
