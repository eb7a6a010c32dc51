"""`scmoe plan --fit`: measured steps beside simulated ones, and which figure of the description must be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scmoe_ds.errors import PlanError
from scmoe_ds.programs.measured_steps import MeasuredRow, read_measured
from scmoe_ds.simulate.cluster import Cluster
from scmoe_ds.simulate.fit import Explanation, Figure, Fit, MeasuredStep, Parts, fit
from scmoe_ds.simulate.layout import Layout
from scmoe_ds.simulate.method import METHODS, Method
from scmoe_ds.simulate.model import Model

StepParts = Callable[[Cluster, Method, Layout], Parts]
"""The simulated milliseconds of a setting: "total", "exposed", "reduce", "optimizer"."""


def fit_lines(
    path: Path, model: Model, method: Method, layout: Layout, cluster: Cluster, parts_of: StepParts
) -> list[str]:
    """The report.

    Args:
        path: of measured steps, as `measured_steps.read_measured` reads them.
        method, layout: of the command line; rows of the file may say what differs.
        parts_of: simulates a setting on a description.

    Raises:
        PlanError: steps of another model or of a layout that the cluster cannot have.
        ArgumentError: a file that has no steps.
    """
    rows = read_measured(path)
    for row in rows:
        _same_model(path, row, model)
    settings = [_setting(path, row, method, layout, cluster) for row in rows]
    tokens = sum(stage.tokens for stage in model.stages[:1])

    def measured_step(row: MeasuredRow, own: Layout) -> MeasuredStep:
        samples = own.micro_batch * own.accumulation * own.data_parallel
        return MeasuredStep(row.name, row.parts(samples, 1 if model.images else tokens), row.spread)

    steps = [measured_step(row, own) for row, (_, own) in zip(rows, settings, strict=True)]

    def simulate(changed: Cluster) -> list[Parts]:
        return [parts_of(changed, own_method, own_layout) for own_method, own_layout in settings]

    found = fit(steps, simulate, cluster)
    return [*_table(steps, found), "", *conclusion(found, cluster)]


def _same_model(path: Path, row: MeasuredRow, model: Model) -> None:
    """Compares sizes that both sides know."""
    shape = (row.facts or {}).get("shape") or {}
    stage = max(model.stages, key=lambda each: each.layers)
    known: dict[str, tuple[Any, Any]] = {
        "num_layers": (shape.get("num_layers"), sum(each.layers for each in model.stages)),
        "hidden_size": (shape.get("hidden_size"), stage.hidden),
        "depths": (shape.get("depths"), [each.layers for each in model.stages]),
        "embed_dim": (shape.get("embed_dim"), model.stages[0].hidden),
        "experts": ((row.facts or {}).get("experts"), _experts(model)),
    }
    for name, (found, own) in known.items():
        if found is not None and (list(found) if isinstance(found, (list, tuple)) else found) != own:
            raise PlanError(
                f"--fit {path}: {name} = {found}: these are steps of another model, {model.name} has {own}; name the "
                "model that was trained"
            )


def _experts(model: Model) -> list[int]:
    return [stage.experts.num_experts for stage in model.stages if stage.experts for _ in stage.moe_layers]


def _setting(path: Path, row: MeasuredRow, method: Method, layout: Layout, cluster: Cluster) -> tuple[Method, Layout]:
    names = {each.name: each for each in (method, *METHODS)}
    if row.method and row.method not in names:
        raise PlanError(f"--fit {path}: method = {row.method}: must be one of {', '.join(map(repr, names))}")
    own = replace(layout, **row.layout)
    there = cluster.nodes * cluster.gpus_per_node
    if own.world != there:
        raise PlanError(
            f"--fit {path}: {own.world} ranks: the cluster has {there} GPUs; describe the cluster that they ran on"
        )
    groups = own.expert_parallel * own.tensor_parallel
    if own.world % own.tensor_parallel or own.data_parallel % own.expert_parallel:
        raise PlanError(f"--fit {path}: {row.name}: EP × TP = {groups}: must divide the {own.world} ranks")
    return names[row.method] if row.method else method, own


def _table(steps: Sequence[MeasuredStep], found: Fit) -> list[str]:
    lines = ["Milliseconds per step, as the cluster is described:"]
    for step, simulated in zip(steps, found.simulated, strict=True):
        parts = [
            f"{'step' if name == 'total' else name} measured {ms:.4g}, simulated {simulated[name]:.4g}"
            for name, ms in step.parts.items()
        ]
        lines.append(f"  {step.name}: {'; '.join(parts)}")
    return lines


def conclusion(found: Fit, cluster: Cluster) -> list[str]:
    """What the steps say about the description."""
    off, noise = _percent(found.error), _percent(found.noise)
    if found.is_right:
        return [
            f"The description explains these steps: {off} off, their own noise is {noise}. No figure needs to change."
        ]
    lines = [f"The simulated steps are {off} off (the measurements' own noise: {noise}).", ""]
    if not found.best:
        lines.append(
            "No single figure explains them: changing any one leaves more than half of the difference. More than one "
            "figure is wrong, or the job ran something else than described."
        )
    elif len(found.best) == 1:
        lines.append(f"Wrong is most likely {_explained(found.best[0], cluster)}.")
    else:
        lines.append("These steps cannot tell apart what is wrong:")
        lines += [f"  {_explained(each, cluster)}" for each in found.best]
        lines.append(
            "Steps with other micro-batches or numbers of nodes would tell, or a measured exposed_ms, or scmoe probe."
        )
    if found.best and found.best[0].error > 2 * found.noise:
        lines.append("What remains is more than the noise of the measurements: another figure is wrong, too.")
    others = [each for each in found.explanations if each not in found.best]
    if others:
        lines += ["", "Changed alone, the others leave more:"]
        lines += [f"  {each.figure.path} × {each.factor:.3g}: {_percent(each.error)} off" for each in others]
    if found.without_effect:
        lines.append(f"Without effect on these steps: {', '.join(each.path for each in found.without_effect)}.")
    return lines


def _explained(each: Explanation, cluster: Cluster) -> str:
    before = each.figure.value(cluster)
    text = f"{each.figure.path}, {each.figure.words}: {_quantity(before, each.figure)} in the description, "
    text += f"{_quantity(before * each.factor, each.figure)} (× {each.factor:.3g}) would explain these steps"
    return f"{text}, {_percent(each.error)} off{_impossible(each, cluster)}"


def _impossible(each: Explanation, cluster: Cluster) -> str:
    """What speaks against a value."""
    share = {"gpu.peak": "product", "gpu.bandwidth": "pointwise"}.get(each.figure.path)
    efficiency = cluster.gpu.efficiency.get(share or "")
    if efficiency is not None and each.factor * efficiency.likely > 1:
        return ". But no kernel would be that fast: the data sheet's peak is less"
    return ""


def _quantity(value: float, figure: Figure) -> str:
    if not figure.unit:
        return f"{value:.3g}"
    if figure.unit == "s":
        return f"{1e6 * value:.3g} us"
    size = 10 ** (3 * min(4, max(0, math.floor(math.log10(value) / 3))))
    return f"{value / size:.3g} {'kMGT'[round(math.log10(size) / 3) - 1] if size > 1 else ''}{figure.unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
