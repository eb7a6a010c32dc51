"""A loaded model leaves out routed experts that hardly matter for a token (DualSparse-MoE, arXiv 2508.18376).

The thresholds of a wanted rate come from sparsity.json, which `scmoe sparsify` writes beside the weights. What was
really left out is counted: another text than the calibration's has other scores. Load-aware thresholds
(moe/decisions/load_aware.py) keep to the rate in each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.droppable import check_layer, check_load_aware, digests_of, top_k_of
from scmoe_ds.inference.load import Loaded
from scmoe_ds.moe.decisions.dropping import DropCounts, DropRule, Places, Thresholds
from scmoe_ds.moe.decisions.halves import HalvedExperts, HalvedGroups
from scmoe_ds.moe.decisions.load_aware import Levels, LoadAwareRule
from scmoe_ds.moe.decisions.partition import whole_experts
from scmoe_ds.moe.layer import StagedMoE
from scmoe_ds.parallel.agreement import gather, run_together
from scmoe_ds.sparse.sparsity_file import FILE, Method, Sparsity, digest_of

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


class Dropped:
    """A model that drops.

    Attributes:
        rate: asked for.
        method: "1t" or "2t".
        load_aware: whether thresholds follow the loads.
    """

    def __init__(self, rate: float, method: Method, load_aware: bool, rules: Sequence[_Rule]) -> None:
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is left out meanwhile."""
        for each in self._rules:
            each.detach()
        try:
            yield
        finally:
            for each in self._rules:
                each.attach()


class _Rule:
    """Of one layer."""

    def __init__(self, layer: Any, rule: DropRule | LoadAwareRule) -> None:
        self._layer, self._rule = layer, rule
        self.attach()

    @property
    def counts(self) -> DropCounts:
        return self._rule.counts

    def attach(self) -> None:
        if isinstance(self._rule, LoadAwareRule):
            self._layer.early_rule = self._rule
        else:
            self._layer.routing_rule = self._rule

    def detach(self) -> None:
        self._layer.routing_rule = self._layer.early_rule = None


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
    if asked is None and not run_together((path / FILE).is_file):
        return None
    sparsity = run_together(lambda: _sparsity(loaded))
    asked = asked or Dropping()
    rate, method = asked.rate or sparsity.rate, asked.method or ("2t" if sparsity.is_sorted else "1t")
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


def moe_layers(model: nn.Module) -> dict[str, Any]:
    """The MoE layers of a model that have two or more experts, in its order, by name: `StagedMoE` of this package's
    models, `ScheduledAutoEP` of Hugging Face's under `scmoe_ds.initialize`."""
    from scmoe_ds.replace.autoep import ScheduledAutoEP  # imports transformers' side of DeepSpeed

    kinds = (StagedMoE, ScheduledAutoEP)
    return {name: each for name, each in model.named_modules() if isinstance(each, kinds) and whole_experts(each) > 1}


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
    found = _thresholds(sparsity, rate, method)
    if len(layers) != len(found):
        raise ArgumentError(
            f"{FILE}: has thresholds of {len(found)} layers, the model has {len(layers)} MoE layers; make it anew "
            "with scmoe sparsify"
        )
    for layer in layers:
        check_layer(layer, method)
    if load_aware:
        check_load_aware(layers)
    if not load_aware:
        return Dropped(rate, method, False, [_attach(*each, method) for each in zip(layers, found, strict=True)])
    rates = level_rates(rate)
    of_levels = [_thresholds(sparsity, each, method) for each in rates[1:]]
    nothing = Thresholds(0.0, 0.0)
    levels = [Levels([nothing, *each], rate) for each in zip(*of_levels, strict=True)]
    return Dropped(rate, method, True, [_attach(*each, method) for each in zip(layers, levels, strict=True)])


def level_rates(rate: float) -> list[float]:
    """The rates of load-aware levels: from nothing to twice the wanted rate, or half of the way to everything. A rank
    drops more only where loads are very uneven."""
    highest = min(2 * rate, (1 + rate) / 2)
    return [highest * number / (LEVELS - 1) for number in range(LEVELS)]


def _thresholds(sparsity: Sparsity, rate: float, method: Method) -> list[Thresholds]:
    # No criterion is below 0, and T minus the spread may be.
    return [Thresholds(max(skip, 0.0), max(halve, 0.0)) for skip, halve in sparsity.thresholds(rate, method)]


def _attach(layer: Any, thresholds: Thresholds | Levels, method: Method) -> _Rule:
    device = next(layer.parameters()).device
    places = Places(layer.num_experts // layer.ep_size, 2 if method == "2t" else 1)
    if method == "2t":
        try:
            if isinstance(layer, StagedMoE):
                layer.deepspeed_moe.experts = HalvedExperts(layer.deepspeed_moe.experts)
            else:
                layer.own_experts = HalvedGroups(layer.experts)
        except ValueError as error:
            raise ArgumentError(f"--drop-method 2t: {error}, or --no-drop") from None
    if isinstance(thresholds, Levels):
        return _Rule(layer, LoadAwareRule(thresholds, places, device))
    return _Rule(layer, DropRule(thresholds, places, device))
