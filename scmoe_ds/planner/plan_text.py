"""A plan as the log shows it: measured times, the cost of every slot, the choice, and whether overlap pays."""

from __future__ import annotations

from collections.abc import Sequence

from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.plan import Plan, break_even, idle_window_ms
from scmoe_ds.planner.schedule_text import schedule_text, slots_text
from scmoe_ds.planner.speed_text import change, compared
from scmoe_ds.planner.times import OperatorTimes, PassTimes, next_label


def plan_lines(name: str, times: OperatorTimes, train: Plan, forward: Plan) -> list[str]:
    """The measured times of one kind of pair, the cost of every slot, and the choice.

    Args:
        name: names the layers that share these times.
        train, forward: the plans for a training step and for a forward pass alone.
    """
    lines = [f"times of {name} (ms per micro-batch, blocking, median, slowest rank):"]
    lines += _operator_table(times)
    lines += ["exposed communication by the slot of the experts (ms; eq. 11 also counts idle window):"]
    lines += _slot_table(times, train, forward)
    lines += [choice_line("training", times, train), choice_line("forward alone", times, forward)]
    return [*lines, _verdict(times, train)]


def summary_line(name: str, times: OperatorTimes, train: Plan, forward: Plan) -> str:
    """The choice for one kind of pair in a line, for the log of a training run.

    Args:
        name, times, train, forward: as for `plan_lines`.
    """
    names = [f"before {operator.name}" for operator in times.backbone] + ["after all operators"]

    def placed(schedule: Schedule) -> str:
        chunks = "" if schedule.num_chunks == 1 else f" in {schedule.num_chunks} chunks"
        places = ", ".join(dict.fromkeys(names[slot - 1] for slot in schedule.slots))
        return f"experts{chunks} {places} ({slots_text(schedule)})"

    alone = "" if forward.schedule == train.schedule else f" | forward alone: {placed(forward.schedule)}"
    return (
        f"schedule of {name}, by measured times: {placed(train.schedule)} | "
        f"{100 * train.predicted.hidden_share:.0f} % of the communication hidden | "
        f"{_ms(train.predicted.total_ms)} {span_text(times)}, without overlap {_ms(train.serial.total_ms)}{alone}"
    )


def choice_line(title: str, times: OperatorTimes, plan: Plan, backbone: Sequence[str] = ()) -> str:
    """What was chosen for a kind of pass.

    Args:
        title: names the kind of pass.
        times, plan: of the pair.
        backbone: names of the operators that the slots count, where no table has shown them.
    """
    others = [
        f"{schedule_text(each)}: {_ms(costs.total_ms)}"
        for each, costs in plan.best_per_chunks
        if each.num_chunks != plan.schedule.num_chunks
    ]
    return (
        f"choice for {title}: {schedule_text(plan.schedule)}"
        + (f" of {', '.join(backbone)}" if backbone else "")
        + f": {_ms(plan.predicted.total_ms)} {span_text(times)}, "
        + f"{100 * plan.predicted.hidden_share:.0f} % of the communication hidden"
        + (f" (without overlap: {_ms(plan.serial.total_ms)})" if backbone else "")
        + (f" (others: {', '.join(others)})" if others else "")
    )


def span_text(times: OperatorTimes) -> str:
    """From where to where a pair's times go."""
    return "from one shortcut to the next" if times.is_periodic else "from shortcut to join"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2}f} ms"  # a decode step may take less than one


def _operator_table(times: OperatorTimes) -> list[str]:
    one = times.chunks[1]
    rows: list[tuple[str, PassTimes]] = [("gate", times.gate), ("encode", times.encode)]
    rows += [(operator.name, operator) for operator in times.backbone]
    late = () if times.late is None else times.late.operators
    rows += [(next_label(operator.name), operator) for operator in late]
    rows += [("experts", one.experts), ("decode", times.decode), ("dispatch", one.dispatch), ("combine", one.combine)]
    lines = ["  operator        forward   backward"]
    lines += [f"  {name:<13} {part.forward_ms:9.2f}  {part.backward_ms:9.2f}" for name, part in rows]
    between = (*times.backbone, *late)
    window = [sum(getattr(operator, f"{phase}_ms") for operator in between) for phase in ("forward", "backward")]
    return [*lines, f"  {'window':<13} {window[0]:9.2f}  {window[1]:9.2f}   (all between shortcut and join)"]


def _slot_table(times: OperatorTimes, train: Plan, forward: Plan) -> list[str]:
    names = [f"before {operator.name}" for operator in times.backbone] + ["after all"]
    lines = [f"  slot {'':<22} forward  training  training total  eq. 11 forward  backward"]
    for slot, name in enumerate(names, start=1):
        costs = train.unchunked[slot - 1][1]
        idle = [idle_window_ms(times, slot, phase) for phase in ("forward", "backward")]
        exposed = forward.unchunked[slot - 1][1].exposed_ms
        lines.append(
            f"  {slot:4d} {name:<22} {exposed:7.2f}  {costs.exposed_ms:8.2f}  {costs.total_ms:14.2f}  "
            f"{idle[0]:14.2f}  {idle[1]:8.2f}"
        )
    return lines


_WORTH = {"gain": "overlap pays", "loss": "overlap costs more than it hides", "none": "overlap gains nothing here"}


def _verdict(times: OperatorTimes, train: Plan) -> str:
    limits = break_even(times, "train")
    one = times.chunks[1]
    each = max(one.dispatch.forward_ms, one.combine.forward_ms, one.dispatch.backward_ms, one.combine.backward_ms)
    gain = train.serial.total_ms / train.predicted.total_ms if train.predicted.total_ms else 1.0
    found = change(gain)
    text = f"{_WORTH[found]}: the pair {compared(gain, 'the same without overlap')}, predicted"
    if found != "gain" and train.serial.total_ms:
        text += (
            f"; communication is {100 * train.serial.communication_ms / train.serial.total_ms:.0f} % of its time from "
            "shortcut to join"
        )
    if times.backbone:
        text += (
            f"; one chunk hides all-to-alls of up to {limits.largest_hidden_ms:.1f} ms completely "
            f"(the longest takes {each:.1f} ms)"
        )
    if limits.shared_ms:
        text += (
            f"; break-even with top-1 MoE without a shared expert at {limits.shared_ms:.1f} ms of communication "
            f"per micro-batch (here {train.predicted.communication_ms:.1f} ms)"
        )
    return text
