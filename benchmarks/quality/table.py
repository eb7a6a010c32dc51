"""Statistics, verdicts, table and figure of a record of benchmarks.quality.compare; they need the record alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.measure import environment_text
from benchmarks.harness.tables import table
from scmoe_ds.analysis.markdown import code, escape
from scmoe_ds.figure_style import BLUE, GREY, VERMILLION, WIDTH, styled

# Two-sided 95 % quantiles of Student's t with 1, 2, … degrees of freedom: with three seeds, two standard errors would
# call one in five differences significant that are none.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_UNEQUAL = 0.01  # share by which a row's compute differs from the first reference's before it is marked
RULE = (
    "Rule: the difference of two variants is the mean over the seeds of the mean over the held-out sequences, and its "
    "standard error that of the seeds' differences. “<” is *confirmed* where 0 lies above the 95 % interval (Student's "
    "t) and the difference is below 0 with every seed, *contradicted* in the opposite case, *within noise* otherwise. "
    "“≈” is *confirmed* where the whole interval lies within ± {margin} nats, *contradicted* where it lies outside, "
    "*within noise* otherwise. With one seed nothing is decided. Each interval is of its own comparison: where there "
    "was no difference at all, one in twenty intervals would still leave 0 out."
)


@dataclass(frozen=True)
class Difference:
    """One variant's loss minus another's, in nats per token; negative: the first is better.

    Attributes:
        seeds: which both have finished, ascending.
        by_seed: mean over the sequences for each of them.
        mean: over the seeds.
        error: standard error over the seeds; None with fewer than two.
        sequence_error: standard error over the sequences, of each sequence's mean over the seeds; sequences of one
            document are alike, so that it is rather too small.
    """

    seeds: tuple[int, ...]
    by_seed: tuple[float, ...]
    mean: float
    error: float | None
    sequence_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, over the seeds; the whole line with fewer than two."""
        if self.error is None:
            return -math.inf, math.inf
        half = _T_95[min(len(self.seeds) - 1, len(_T_95)) - 1] * self.error
        return self.mean - half, self.mean + half


def finished(record: dict[str, Any], variant: str) -> dict[int, dict[str, Any]]:
    """The finished runs of a variant by seed."""
    runs = [run for run in record["runs"] if run["variant"] == variant and run["status"] == "finished"]
    return {run["seed"]: run for run in sorted(runs, key=lambda run: run["seed"])}


def paired(record: dict[str, Any], first: str, second: str) -> Difference | None:
    """Of the seeds that both variants have; None if there is none."""
    ours, theirs = finished(record, first), finished(record, second)
    seeds = tuple(seed for seed in ours if seed in theirs)
    if not seeds:
        return None
    by_sequence = [
        [a - b for a, b in zip(ours[seed]["sequence_losses"], theirs[seed]["sequence_losses"], strict=True)]
        for seed in seeds
    ]
    by_seed = tuple(statistics.fmean(differences) for differences in by_sequence)
    over_seeds = [statistics.fmean(values) for values in zip(*by_sequence, strict=True)]
    return Difference(
        seeds, by_seed, statistics.fmean(by_seed), _standard_error(by_seed), _standard_error(over_seeds) or 0.0
    )


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdict(difference: Difference | None, relation: str, margin: float) -> str:
    """What the record says of a claim, by `RULE`.

    Args:
        relation: "<" or "≈".
        margin: nats per token, for "≈".
    """
    if difference is None or difference.error is None:
        return "not decided (fewer than two seeds)"
    low, high = difference.interval
    if relation == "≈":
        if -margin < low and high < margin:
            return "confirmed"
        return "contradicted" if low > margin or high < -margin else "within noise"
    if high < 0 and max(difference.by_seed) < 0:
        return "confirmed"
    return "contradicted" if low > 0 and min(difference.by_seed) > 0 else "within noise"


def markdown(record: dict[str, Any]) -> str:
    """The record as the paper's table 3 has it, with spread, and a verdict on each claim."""
    lines = [
        f"# Validation loss by architecture: preset {record['identity']['preset']}",
        "",
        *setting(record),
        "",
        *_losses(record),
        "",
        *_verdicts(record),
        *failures(record),
    ]
    return "\n".join(lines) + "\n"


def setting(record: dict[str, Any]) -> list[str]:
    """Commands, machine, sizes and text of a record, for the head of its table."""
    identity, corpus = record["identity"], record["corpus"]
    environments = "; ".join(map(environment_text, record["environments"]))
    flags = ", ".join(f"{name} {value}" for name, value in identity["flags"].items())
    sizes = ", ".join(
        f"{part} {corpus['documents'][part]} documents, {corpus['bytes'][part] / 1e6:.1f} MB, "
        f"{corpus['tokens'][part] / 1e6:.2f} M tokens"
        for part in ("train", "validation")
    )
    optimizer = identity["deepspeed"]["optimizer"]
    return [
        *(code(command) for command in record["commands"]),
        "",
        f"{environments}. Model and loop: {flags}. {optimizer['type']}, learning rate {optimizer['params']['lr']:g}; "
        f"{record['tokens'] / 1e6:.2f} M training tokens a run, {record['tokens'] / corpus['tokens']['train']:.2f} "
        f"epochs. Seeds {', '.join(map(str, record['seeds']))}.",
        "",
        f"Text: library and installed packages of Python {corpus['python']} ({sizes}; sha256 {corpus['sha256'][:12]}), "
        f"BPE of {corpus['vocab_size']} tokens. Losses are of the same {_sequences(record)} held-out sequences for all "
        "runs, evaluated without drops. Runs of one seed have the same initial weights, where they have the same "
        "layers, and the same batches in the same order.",
    ]


def failures(record: dict[str, Any]) -> list[str]:
    """A section with the runs that have failed, if there are any."""
    failed = [run for run in record["runs"] if run["status"] == "failed"]
    lines = ["", "## Failed runs", ""] if failed else []
    return lines + [
        f"- {escape(run['variant'])}, seed {run['seed']}, after {run['seconds']:.0f} s: "
        f"{escape(run['error'].strip().splitlines()[-1])}"
        for run in failed
    ]


def _sequences(record: dict[str, Any]) -> int:
    return max((len(run.get("sequence_losses", ())) for run in record["runs"]), default=0)


def _losses(record: dict[str, Any]) -> list[str]:
    references, variants = record["references"], record["variants"]
    base = variants[references[0]]["forward_flops_per_token"]
    rows = []
    for name, variant in variants.items():
        runs, flops = finished(record, name), variant["forward_flops_per_token"]
        losses = [run["loss"] for run in runs.values()]
        speeds = [run["tokens_per_second"] for run in runs.values() if run["tokens_per_second"]]
        failures = sum(run["variant"] == name and run["status"] == "failed" for run in record["runs"])
        rows.append(
            [
                name,
                mean_and_deviation(losses),
                f"{math.exp(min(statistics.fmean(losses), 700)):.3f}" if losses else "–",
                *(
                    "" if name == reference else difference_cell(paired(record, name, reference))
                    for reference in references
                ),
                f"{flops / 1e6:.2f}" + (f" ({unequal})" if (unequal := _compute_cell(flops / base - 1)) else ""),
                f"{variant['active_parameters'] / 1e6:.2f} of {variant['parameters'] / 1e6:.2f}",
                f"{statistics.median(speeds):.0f}" if speeds else "–",
                f"{len(runs)} of {len(record['seeds'])}" + (f", {failures} failed" if failures else ""),
            ]
        )
    header = [
        "architecture",
        "loss, nats per token",
        "perplexity",
        *(f"loss − {name}'s" for name in references),
        "forward MFLOP per token",
        "active parameters, M",
        "tokens/s",
        "runs",
    ]
    note = (
        "Loss: mean ± standard deviation over the seeds. Differences: mean ± standard error over the seeds of the "
        "paired differences; in brackets the standard error over the sequences, which knows nothing of other seeds. "
        f"Rows with a percentage compute more or less per token than {references[0]}: their losses are not at equal "
        "compute. Tokens/s: training, median over the seeds of the medians of the log lines."
    )
    return [*table(header, rows), "", note]


def _compute_cell(difference: float) -> str:
    return f"{difference:+.0%}" if abs(difference) > _UNEQUAL else ""


def mean_and_deviation(losses: Sequence[float]) -> str:
    """ "mean ± standard deviation"; of one value no deviation is known."""
    if not losses:
        return "–"
    deviation = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{deviation}"


def difference_cell(difference: Difference | None) -> str:
    """ "mean ± standard error over the seeds (over the sequences)"."""
    if difference is None:
        return "–"
    error = "" if difference.error is None else f" ± {difference.error:.4f}"
    return f"{difference.mean:+.4f}{error} ({difference.sequence_error:.4f})"


def _verdicts(record: dict[str, Any]) -> list[str]:
    margin = record["equivalence_margin_nats"]
    rows = []
    for first, relation, second, *paper in record["claims"]:
        difference = paired(record, first, second)
        cells = ["–", "–", "0"]
        if difference is not None:
            low, high = difference.interval
            interval = "–" if difference.error is None else f"{low:+.4f} … {high:+.4f}"
            cells = [difference_cell(difference), interval, str(len(difference.seeds))]
        flops = [record["variants"][name]["forward_flops_per_token"] for name in (first, second)]
        rows.append(
            [
                f"{first} {relation} {second}",
                verdict(difference, relation, margin),
                *cells,
                _compute_cell(flops[0] / flops[1] - 1),
                "".join(paper),
            ]
        )
    header = [
        "claim (loss)",
        "verdict",
        "difference, nats per token",
        "95 % interval",
        "seeds",
        "the first one's compute",
        "the paper's numbers, first and second",
    ]
    return ["## Verdict", "", RULE.format(margin=margin), "", *table(header, rows)]


@styled
def figure(record: dict[str, Any]) -> Figure:
    """Above, the loss of each variant with its standard deviation. Below, learning curves as differences from the first
    reference, a panel for each family of variants, with all others in grey: the curves themselves lie on each other.
    """
    names = [name for name in record["variants"] if finished(record, name)]
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(_family(name), []).append(name)
    families = dict(sorted(families.items(), key=lambda each: each[0] == _OTHERS))
    rows = max(-(-len(families) // 3), 1)
    whole = Figure(figsize=(WIDTH, 1.3 + 0.26 * len(names) + 2.9 * rows))
    panels = whole.subplot_mosaic(
        [["losses"] * 3, *([f"family {3 * row + column}" for column in range(3)] for row in range(rows))],
        height_ratios=[1 + 0.26 * len(names), *[2.9] * rows],
    )
    _draw_losses(panels.pop("losses"), record, names)
    curves = {name: _curve(record, name) for name in names}
    below = list(panels.values())
    for axes in below[len(families) :]:
        axes.set_axis_off()
    for axes, (family, members) in zip(below, families.items(), strict=False):
        axes.sharey(below[0]) if axes is not below[0] else None
        axes.grid(True)
        _draw_family(axes, record["references"][0], curves, members)
        axes.set(title=family, xlabel="training tokens, millions")
        axes.legend(loc="lower right", fontsize=7.5)
    low, high = below[0].get_ylim()
    below[0].set_ylim(low - 0.5 * (high - low), high)  # room for the legends
    for axes in below[::3]:
        axes.set_ylabel(f"validation loss − {record['references'][0]}'s, nats")
    return whole


_OTHERS = "others with a shortcut"


def _family(name: str) -> str:
    """Variants that a reader compares: "ScMoE Pos-1" for "ScMoE Pos-1 add"."""
    words = name.split()
    if words[0] == "ScMoE" and len(words) == 3:
        return " ".join(words[:2])
    return _OTHERS if words[0].startswith(("ScMoE", "DGMoE")) else "without a shortcut"


def _curve(record: dict[str, Any], name: str) -> dict[int, float]:
    """Validation loss by tokens, mean over the seeds."""
    points: dict[int, list[float]] = {}
    for run in finished(record, name).values():
        for tokens, loss in run["validation"]:
            points.setdefault(tokens, []).append(loss)
    return {tokens: statistics.fmean(points[tokens]) for tokens in sorted(points)}


def _draw_family(axes: Axes, reference: str, curves: dict[str, dict[int, float]], members: Sequence[str]) -> None:
    base = curves.get(reference) or {}
    for name, curve in sorted(curves.items(), key=lambda each: each[0] in members):
        tokens = [each for each in curve if each in base]
        values = [curve[each] - base[each] for each in tokens]
        style: dict[str, Any] = {"label": name} if name in members else {"color": "#DDDDDD", "marker": "", "zorder": 1}
        style |= {"linestyle": "-"} if name not in members else {}
        axes.plot([each / 1e6 for each in tokens], values, **style)


def _draw_losses(axes: Axes, record: dict[str, Any], names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        losses = [run["loss"] for run in finished(record, name).values()]
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
        axes.errorbar([statistics.fmean(losses)], [place], xerr=[deviation], fmt="o", color=BLUE, capsize=4)
        axes.plot(losses, [place] * len(losses), "x", color=VERMILLION, markersize=5)
    if (reference := record["references"][0]) in names:
        mean = statistics.fmean(run["loss"] for run in finished(record, reference).values())
        axes.axvline(mean, color=GREY, linewidth=1, linestyle="--", marker="")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="loss on held-out sequences, nats per token")
    axes.set_title(f"mean ± standard deviation over the seeds (crosses); dashed: {record['references'][0]}")
    axes.grid(True)
