"""Schedules in words, as the log shows them: which layers, what runs between their tap and their join, and why so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.overlap.executor import Backbone, backbone
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.times import LateWindow, next_label


class Scheduled(Backbone, Protocol):
    """A pair, as far as these words need it. A replaced layer's pair also has the layer's path as its `name`."""

    late_window: LateWindow | None
    schedule: Schedule


def schedule_lines(pairs: Mapping[int, Scheduled], origin: str) -> list[str]:
    """One line per distinct schedule: the layers, their backbone, and the experts' place in it.

    Args:
        pairs: number of an MoE layer to its pair, in order.
        origin: who has chosen the schedules, see `origin_of`.
    """
    layers: dict[str, list[int]] = {}
    for number, pair in pairs.items():
        layers.setdefault(_line(labels_of(pair), pair.schedule, origin), []).append(number)
    lines = []
    for text, indices in layers.items():
        names = [name for index in indices if (name := getattr(pairs[index], "name", ""))]
        where = f" ({names_text(names)})" if names else ""
        lines.append(f"schedule of MoE layer {layers_text(indices)}{where}: {text}")
    return lines


def labels_of(pair: Scheduled) -> list[str]:
    """The operators between tap and join. With a late join the last ones are the next pair's."""
    late = () if pair.late_window is None else pair.late_window.operators
    return [*(operator.label for operator in backbone(pair)), *map(next_label, late)]


def origin_of(overlap: OverlapConfig, exchanges: bool) -> str:
    """Who has chosen a schedule that is not timed.

    Args:
        overlap: the section's "overlap".
        exchanges: whether the layer's ranks exchange tokens.
    """
    if overlap.expert_slot != "auto":
        return "set by scmoe.overlap.expert_slot"
    if not exchanges:
        return "auto: nothing to time, because no rank exchanges tokens with another"
    return "auto: splits the backbone in half; nothing is timed"


def _line(labels: Sequence[str], schedule: Schedule, origin: str) -> str:
    mode = "overlapped" if schedule.overlap else "without overlap"
    return f"{order_text(labels, schedule.slots)} ({mode}; {origin})"


def order_text(labels: Sequence[str], slots: Sequence[int]) -> str:
    """What runs between tap and join, in order: "dispatch ⇢ mlp → [routed experts] → attention → shared ⇢ combine".

    Args:
        labels: of the backbone's operators, and of those of the next pair before a late join.
        slots: of the chunks; several are numbered from 0, as in a trace.
    """
    names = list(labels)
    for chunk, slot in reversed(list(enumerate(slots))):
        names.insert(slot - 1, "[routed experts]" if len(slots) == 1 else f"[experts {chunk}]")
    return f"dispatch ⇢ {' → '.join(names)} ⇢ combine"


def schedule_text(schedule: Schedule) -> str:
    """A schedule in words."""
    if schedule.num_chunks == 1:
        return f"experts at {slots_text(schedule)}"
    return f"{schedule.num_chunks} chunks of experts at {slots_text(schedule)}"


def slots_text(schedule: Schedule) -> str:
    """The slots of a schedule in words: "slot 2" or "slots 2, 3"."""
    if len(set(schedule.slots)) == 1:
        return f"slot {schedule.slots[0]}"
    return "slots " + ", ".join(map(str, schedule.slots))


def layers_text(layers: Sequence[int]) -> str:
    """Numbers in words: "3", "0–5", "0, 2"."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def names_text(names: Sequence[str]) -> str:
    """Paths of modules in one: "blocks.1.mlp", "blocks.{1,3}.mlp", "h.{1,3,…,23}.mlp", or else "a, b, …, z"."""
    names = list(dict.fromkeys(names))
    parts = [name.split(".") for name in names]
    depths = {len(each) for each in parts}
    if len(names) > 1 and len(depths) == 1 and depths != {1}:
        differ = [place for place, each in enumerate(zip(*parts, strict=True)) if len(set(each)) > 1]
        if len(differ) == 1:
            (place,) = differ
            inner = "{" + _shortened([each[place] for each in parts], ",") + "}"
            return ".".join([*parts[0][:place], inner, *parts[0][place + 1 :]])
    return _shortened(names, ", ")


def _shortened(words: Sequence[str], between: str) -> str:
    return between.join(words if len(words) <= 4 else [*words[:2], "…", words[-1]])
