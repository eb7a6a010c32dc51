"""The record of benchmarks.quality.low_precision as a page."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.measure import environment_text
from benchmarks.harness.tables import table
from scmoe_ds.analysis.markdown import code
from scmoe_ds.planner.rounds import Spread

_HEAD = """Two ranks, fp32 weights, int8 in hot ranks but for the rows of 4 bits. Change: of the loss over “off”, and
from the lowest to the highest tenth of {groups} groups of held-out sequences. Loads are over the mean, and a mean of
all layers. Hot: the share of passes in which rank 0 / rank 1 was, layer by layer."""
_OF_LOADS = ["gate", "busiest expert", "of tolerant rows", "of others", "tolerant"]
_OF_LOADS += ["busiest of 2 ranks, tolerant there", "busiest of 4 ranks, tolerant there"]
_OF_ROWS = ["gate", "row", "loss", "change", "tokens right", "hot"]


def markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    lines = ["# Low precision on overloaded ranks: quality", "", code(record["command"]), ""]
    lines += [f"{environment_text(record['environment'])}.", "", _HEAD.format(**record), ""]
    for model in record["models"]:
        tolerant = "patches" if model["score"] is None else f"choices with a score below {model['score']:.3f}"
        lines += [f"## {model['title']}", "", f"Low precision is tolerated by {tolerant}.", ""]
        lines += [*table(_OF_LOADS, [_load_row(skew) for skew in model["skews"]]), ""]
        lines += [*table(_OF_ROWS, [cells for skew in model["skews"] for cells in _rows(skew)]), ""]
    return "\n".join(lines)


def _gate(found: dict[str, Any]) -> str:
    return "as trained" if found["skew"] is None else f"first expert {found['skew']:g} ×"


def _load_row(found: dict[str, Any]) -> list[str]:
    layers = found["layers"]
    busiest = [[each["busiest_expert"], *each["busiest_of_kind"], each["tolerant"]] for each in layers]
    *loads, tolerant = (sum(each) / len(each) for each in zip(*busiest, strict=True))
    cells = [_gate(found), *(f"{each:.2f}" for each in loads), f"{100 * tolerant:.0f} %"]
    for ranks in ("2", "4"):
        of_layers = [each["ranks"][ranks] for each in layers]
        of_busiest = [max(zip(each["load"], each["tolerant"], strict=True)) for each in of_layers]
        load, share = (sum(each) / len(each) for each in zip(*of_busiest, strict=True))
        cells.append(f"{load:.2f}, {100 * share:.0f} %")
    return cells


def _rows(found: dict[str, Any]) -> list[list[str]]:
    off, cells = found["rows"][0]["loss"], []
    for number, row in enumerate(found["rows"]):
        mean = sum(row["loss"]) / len(row["loss"])
        spread = Spread.of([100 * (one / other - 1) for one, other in zip(row["loss"], off, strict=True)])
        change = 100 * (mean * len(off) / sum(off) - 1)
        text = "" if number == 0 else f"{change:+.3f} % ({spread.p10:+.3f} … {spread.p90:+.3f})"
        right = "" if row["right"] is None else f"{100 * row['right']:.2f} %"
        hot = "; ".join(
            " / ".join(f"{100 * rank:.0f}" for rank in ranks) + " %" for ranks in zip(*row["hot"], strict=True)
        )
        cells.append([_gate(found) if number == 0 else "", row["row"], f"{mean:.4f}", text, right, hot])
    return cells
