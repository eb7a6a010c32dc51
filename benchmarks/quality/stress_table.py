"""Table and figure of a record of benchmarks.quality.stress, from it and the records of benchmarks.speed.block."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from benchmarks.harness.tables import table
from benchmarks.quality.table import (
    RULE,
    Difference,
    difference_cell,
    failures,
    finished,
    mean_and_deviation,
    paired,
    setting,
    verdict,
)
from benchmarks.speed.frequency import RECORDS, RESULTS, Measured, predict, read_measured
from scmoe_ds.analysis.similarity import POSITIONS, THRESHOLD
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.figure_style import BLUE, INK, LINES, MARKERS, VERMILLION, WIDTH, styled


def markdown(record: dict[str, Any]) -> str:
    """Similarity and loss under each change, and the frequencies of MoE layers with their predicted speed-up."""
    lines = [
        f"# Shortcuts under stress: preset {record['identity']['preset']}",
        "",
        *setting(record),
        "",
        *_conditions(record),
        "",
        *_frequencies(record),
        *failures(record),
    ]
    return "\n".join(lines) + "\n"


def condition(variant: str) -> str:
    """What is changed in a variant: its name without the architecture."""
    return variant.split(", ", 1)[1]


def similarity_of(record: dict[str, Any], variant: str, position: str, distance: int = 1) -> list[float]:
    """Cosine similarity between the ends of a position's shortcut over so many blocks in each MoE layer, mean over the
    seeds; empty where no layer has such an end, or nothing has run."""
    found = []
    for run in finished(record, variant).values():
        names, cosine = run["similarity"]["names"], run["similarity"]["cosine"]
        found.append([cosine[tap][current] for tap, current in shortcuts(names, position, distance)])
    return [statistics.fmean(layer) for layer in zip(*found, strict=True)]


def shortcuts(names: Sequence[str], position: str, distance: int) -> list[tuple[int, int]]:
    """Places in `names`, for each MoE layer, of what a shortcut would tap and of the MoE's own input.

    Args:
        names: of all representations, as the analysis names them.
        distance: blocks between tap and MoE.
    """
    # Three names stand for block b: the attention's output is number 2 b + 1, its input and output are around it.
    offset = {"pos1": 1, "pos2": 0, "pos3": -1}[position]
    attentions = [place - 1 for place, name in enumerate(names) if name.endswith(" MoE")]
    ends = [(attention - 2 * distance + offset, attention) for attention in attentions]
    return [(tap, attention) for tap, attention in ends if tap >= 0]


def adjacent_similarity(record: dict[str, Any], variant: str) -> float | None:
    """Between each representation and the next one: mean over pairs and seeds."""
    found = [np.diagonal(np.array(run["similarity"]["cosine"]), 1).mean() for run in finished(record, variant).values()]
    return float(np.mean(found)) if found else None


def _conditions(record: dict[str, Any]) -> list[str]:
    margin = record["equivalence_margin_nats"]
    rows = []
    for scmoe, relation, top2, *_ in record["claims"]:
        difference, distance = paired(record, scmoe, top2), _distance(record, scmoe)
        rows.append(
            [
                condition(scmoe),
                *(
                    mean_and_deviation([run["loss"] for run in finished(record, name).values()])
                    for name in (top2, scmoe)
                ),
                difference_cell(difference),
                verdict(difference, relation, margin),
                *(_similarity_cell(similarity_of(record, top2, position, distance)) for position in POSITIONS),
                _similarity_cell(similarity_of(record, scmoe, _own_position(record, scmoe), distance)),
                _number(adjacent_similarity(record, top2)),
            ]
        )
    header = [
        "changed",
        "loss of top-2",
        "loss of ScMoE",
        "ScMoE − top-2",
        "is ScMoE's lower?",
        *(f"Pos-{each[-1]} in top-2" for each in POSITIONS),
        "own shortcut of ScMoE",
        "adjacent in top-2",
    ]
    note = (
        "Loss: nats per token, mean ± standard deviation over the seeds; difference: mean ± standard error of the "
        "paired differences (in brackets over the sequences). Base: the model above, pre-norm, residual scale 1, MoE "
        "in every second block. ScMoE: CG-1, Pos-2; with an MoE in every block Pos-1. Similarity: cosine between what "
        "a shortcut of that position (and distance) would tap and the MoE's own input, of each MoE layer in order, "
        f"mean over the seeds; under {THRESHOLD} in bold. The columns “in top-2” ask the standard model, as the paper "
        "does; the last one is the mean over all neighbouring representations."
    )
    return ["## What is changed", "", *table(header, rows), "", note, "", RULE.format(margin=margin)]


def _distance(record: dict[str, Any], variant: str) -> int:
    return int(record["variants"][variant]["section"].get("shortcut_distance", 1))


def _own_position(record: dict[str, Any], variant: str) -> str:
    return str(record["variants"][variant]["section"]["position"])


def _similarity_cell(layers: list[float]) -> str:
    return ", ".join(f"{each:.2f}" if each >= THRESHOLD else f"**{each:.2f}**" for each in layers) or "–"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def frequencies(record: dict[str, Any]) -> list[tuple[str, str, ScMoEConfig]]:
    """The claims that differ from the base in the section alone: ScMoE, top-2, and ScMoE's section."""
    variants = record["variants"]
    return [
        (scmoe, top2, ScMoEConfig.from_deepspeed({"scmoe": variants[scmoe]["section"]}))
        for scmoe, _, top2, *_ in record["claims"]
        if not variants[scmoe]["flags"]
    ]


def _frequencies(record: dict[str, Any]) -> list[str]:
    measured = {name: read_measured(RESULTS / f"{name}.json", "train") for name in RECORDS}
    rows = []
    for scmoe, top2, config in sorted(frequencies(record), key=lambda each: each[2].moe_every):
        cells = [_speedup_cell(each, config) for each in measured.values()]
        position = "Pos-1" if config.moe_every == 1 else f"Pos-{config.position[-1]}"
        if config.shortcut_distance > 1:
            position += f", distance {config.shortcut_distance}"
        losses = [
            mean_and_deviation([run["loss"] for run in finished(record, name).values()]) for name in (scmoe, top2)
        ]
        mflop = f"{record['variants'][scmoe]['forward_flops_per_token'] / 1e6:.2f}"
        rows.append(
            [f"1/{config.moe_every}", position, *cells, *losses, difference_cell(paired(record, scmoe, top2)), mflop]
        )
    shares = [f"predicted speed-up at {each.share:.0%}" for each in measured.values()]
    header = [
        "MoE frequency",
        "shortcut",
        *shares,
        "loss of ScMoE",
        "loss of top-2",
        "ScMoE − top-2",
        "forward MFLOP per token",
    ]
    records = ", ".join(f"[{name}]({name}.md)" for name in RECORDS)
    note = (
        "Speed-up: **predicted** by the planner, of a training step's blocks (without embedding, head and optimizer), "
        "over top-2 at the same frequency with communication that nothing hides / over the best pipelined top-2; in "
        "brackets the share of communication that is hidden. The norm in front of top-2's MoE is left out (below 1 %, "
        "in its favour). Operator times: as measured on two nodes for "
        f"{records}, at their shares of communication in the time of the top-2 MoE; their blocks are larger than those "
        "of the losses. What frequency 1/2 with Pos-2 measured there is in those records."
    )
    return ["## How often there is an MoE", "", *table(header, rows), "", note]


def _speedup_cell(measured: Measured, config: ScMoEConfig) -> str:
    found = predict(measured, config, "train")
    return f"{found.blocking_ms / found.scmoe_ms:.2f} / {found.pipelined_ms / found.scmoe_ms:.2f} ({found.hidden:.0%})"


@styled
def figure(record: dict[str, Any]) -> Figure:
    """Difference of the losses and similarity per position under each change; below, heat maps of the top-2 models."""
    claims = [claim for claim in record["claims"] if finished(record, claim[0]) and finished(record, claim[2])]
    shown = list(dict.fromkeys(claim[2] for claim in claims))
    maps = -(-len(shown) // 5)
    above, below = 1.4 + 0.38 * len(claims), 0.6 + 1.9 * maps
    whole = Figure(figsize=(WIDTH, above + below))
    upper, lower = whole.subfigures(2, 1, height_ratios=(above, below))
    left, right = upper.subplots(1, 2, sharey=True)
    _draw_differences(left, record, claims)
    _draw_similarities(right, record, claims)
    _draw_maps(lower, record, shown, maps)
    return whole


def _draw_maps(lower: SubFigure, record: dict[str, Any], shown: list[str], rows: int) -> None:
    panels = list(lower.subplots(max(rows, 1), 5, squeeze=False).flat)
    matrices = {
        name: np.mean([run["similarity"]["cosine"] for run in finished(record, name).values()], axis=0)
        for name in shown
    }
    image = None
    for axes, name in zip(panels, shown, strict=False):
        image = axes.imshow(matrices[name], vmin=min(0.0, *map(np.min, matrices.values())), vmax=1)
        axes.set_title(condition(name).replace("MoE in every ", "MoE in every\n"), fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    if image is not None:
        lower.colorbar(image, ax=panels, shrink=0.8, label="cosine similarity")
    lower.suptitle(
        "top-2 models: all representations, from the input to the last block, mean over the seeds", fontsize=11
    )


def _draw_differences(axes: Axes, record: dict[str, Any], claims: list[list[str]]) -> None:
    for place, (scmoe, _, top2, *_) in enumerate(claims):
        found: Difference | None = paired(record, scmoe, top2)
        assert found is not None
        axes.plot(found.by_seed, [place] * len(found.by_seed), "x", color=VERMILLION)
        axes.errorbar([found.mean], [place], xerr=[found.error or 0.0], fmt="o", color=BLUE, capsize=4)
    axes.axvline(0, color=INK, linewidth=0.8, marker="")
    axes.set_yticks(range(len(claims)), [_folded(condition(claim[0])) for claim in claims])
    axes.set_ylim(len(claims) - 0.4, -0.6)
    axes.set(xlabel="nats per token; below 0 ScMoE is better\nmean ± standard error; crosses: seeds")
    axes.set_title("loss of ScMoE − loss of top-2")
    axes.grid(True)


def _folded(text: str) -> str:
    return text.replace("block, distance", "block,\ndistance")


def _draw_similarities(axes: Axes, record: dict[str, Any], claims: list[list[str]]) -> None:
    for number, position in enumerate(POSITIONS):
        for place, (scmoe, _, top2, *_) in enumerate(claims):
            layers = similarity_of(record, top2, position, _distance(record, scmoe))
            height = place + 0.22 * (number - 1)
            label = f"Pos-{position[-1]}" if place == 0 else None
            style: dict[str, Any] = {"marker": MARKERS[number], "color": LINES[number], "linestyle": ""}
            axes.plot(layers, [height] * len(layers), label=label, **style)
    axes.axvline(THRESHOLD, color=INK, linestyle=":", linewidth=1, marker="")
    axes.set(xlabel=f"cosine similarity; dotted: {THRESHOLD}\na mark for each MoE layer")
    axes.set_title("top-2: what a shortcut would connect")
    if claims:
        axes.legend(loc="center", bbox_to_anchor=(0.5, 0.5))
    axes.grid(True)
