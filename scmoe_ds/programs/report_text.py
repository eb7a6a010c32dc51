"""What scmoe report says of its measurements: one sentence, where a gain or a loss comes from, and what to change."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.planner.rounds import Spread
from scmoe_ds.planner.simulation import total_ms
from scmoe_ds.planner.speed_text import compared_as_measured, measured_change
from scmoe_ds.planner.times import SHARED, OperatorTimes
from scmoe_ds.trace.recorder import PHASES, Phase
from scmoe_ds.trace.spans import HiddenShare

OURS, SERIAL, DEEPSPEED = "ours", "without overlap", "DeepSpeed"
SMALL_SHARE = 0.05
"""Of a step: less communication is not worth hiding."""
WELL_HIDDEN = 0.8
NOISY = 1.2
"""The 90th percentile over the 10th, of the rounds' speed-ups; then a small difference cannot be seen."""
LARGE_OVERHEAD = 0.15
"""Of a pair's time: gate, encode and decode should take less."""


@dataclass(frozen=True)
class Measured:
    """Whole training steps of one model.

    Attributes:
        config: the "scmoe" section.
        ranks: processes of the run.
        baseline: what DeepSpeed's own layer is called in sentences: "DeepSpeed's top-2".
        seconds: of each round's step by variant, of the slowest rank: OURS; SERIAL if anything travels and can be
            hidden; DEEPSPEED if the model is not DeepSpeed's own top-k already.
        hidden: communication of one step and its exposed part, by phase, mean over ranks.
        times: of each kind of pair, with the number of such pairs; empty if nothing travels.
        accumulation: micro-batches of a step.
        tables: the calibration's, for --details.
    """

    config: ScMoEConfig
    ranks: int
    baseline: str
    seconds: Mapping[str, Sequence[float]]
    hidden: Mapping[Phase, HiddenShare]
    times: Sequence[tuple[OperatorTimes, int]]
    accumulation: int
    tables: Sequence[str] = ()

    def speedup(self, variant: str, other: str) -> Spread:
        """How many times as fast a variant is as another, within rounds."""
        return Spread.of_ratios(self.seconds[other], self.seconds[variant])

    @property
    def hidden_share(self) -> float:
        """Of both passes."""
        of_passes = self.hidden.values()
        return HiddenShare(sum(p.communication_ms for p in of_passes), sum(p.exposed_ms for p in of_passes)).share

    @property
    def communication_share(self) -> float:
        """Share of a step without overlap that is communication, as it was timed with nothing beside it."""
        one_ms = sum(layers * _total(each, "dispatch", "combine") for each, layers in self.times)
        return min(1.0, 1e-3 * one_ms * self.accumulation / statistics.median(self.seconds[SERIAL]))


def sentence(found: Measured) -> str:
    """The first line."""
    if SERIAL in found.seconds:
        overlap = f"overlap hides {100 * found.hidden_share:.0f} % of the communication"
    elif found.config.is_scheduled or found.config.expert_parallel_size == 1:
        overlap = "no token travels between ranks, so there is no communication to hide"
    else:
        overlap = "DeepSpeed's own layers hide none of their communication"
    if DEEPSPEED not in found.seconds:
        return f"{overlap}; a step takes {_ms(found.seconds[OURS])} with {found.baseline}, measured"
    speedup = found.speedup(OURS, DEEPSPEED)
    measured = "" if measured_change(speedup) == "none" else ", measured"
    return f"{overlap}; a step {compared_as_measured(speedup, found.baseline)}{measured}"


def reasons(found: Measured) -> list[str]:
    """Where the difference to DeepSpeed's layer comes from, and what to change; a line each."""
    lines = []
    if DEEPSPEED in found.seconds:
        lines.append(_comparison("in all", found, OURS, DEEPSPEED, found.baseline))
    if SERIAL in found.seconds:
        lines.append(_comparison("with overlap", found, OURS, SERIAL, "the same without overlap"))
        lines.append(_comparison("without overlap", found, SERIAL, DEEPSPEED, found.baseline))
    return lines + [f"to change: {each}" for each in _remedies(found)]


def _comparison(what: str, found: Measured, variant: str, other: str, name: str) -> str:
    speedup = found.speedup(variant, other)
    return (
        f"{what} a step {compared_as_measured(speedup, name)} "
        f"({speedup.p10:.2f}–{speedup.p90:.2f} × in {len(found.seconds[OURS])} rounds)"
    )


def _remedies(found: Measured) -> Iterator[str]:
    config = found.config
    noise = found.speedup(OURS, DEEPSPEED) if DEEPSPEED in found.seconds else None
    if noise and measured_change(noise) == "none" and noise.p90 > NOISY * noise.p10:
        yield f"rounds differ by up to {100 * (noise.p90 / noise.p10 - 1):.0f} %: measure when nothing else runs here"
    if noise is None:
        yield f'set scmoe.architecture from "{config.architecture}" to "scmoe", and run the report again'
        return
    if SERIAL not in found.seconds:
        yield _more_ranks(found)
        return
    share = found.communication_share
    if share < SMALL_SHARE:
        yield (
            f"communication is only {100 * share:.1f} % of a step, and overlap cannot gain more than that; it pays "
            "where more travels: expert parallelism across nodes, a larger scmoe.expert_parallel_size"
        )
    elif measured_change(found.speedup(OURS, SERIAL)) == "loss":
        yield (
            "what travels in the background slows down the computation beside it by more than it hides; "
            '"overlap": {"enabled": false} is faster here'
            + (', "num_chunks": 1 may be' if config.overlap.num_chunks != 1 else "")
        )
    elif found.hidden_share < WELL_HIDDEN:
        yield from _exposed(found)
    if measured_change(found.speedup(SERIAL, DEEPSPEED)) == "loss":
        yield _slower_layer(found)


def _more_ranks(found: Measured) -> str:
    if found.ranks == 1:
        return "this is one process; start the report as the training will be started, on all of its ranks"
    if found.config.expert_parallel_size == 1:
        return "scmoe.expert_parallel_size is 1, so that each rank holds all experts; more ranks hold more experts"
    return f'scmoe.architecture "{found.config.architecture}" hides nothing; "scmoe" does'


def _exposed(found: Measured) -> Iterator[str]:
    """What shortens the communication or lengthens the computation beside it, if that is too short."""
    config = found.config
    window_ms = sum(layers * _backbone_ms(each) for each, layers in found.times)
    sent_ms = sum(layers * _total(each, "dispatch", "combine") for each, layers in found.times)
    between = f"{window_ms:.1f} ms of computation between shortcut and join, {sent_ms:.1f} ms of communication"
    if window_ms > 1.25 * sent_ms:
        yield (
            f"the window is long enough ({between} per micro-batch), so the transfers come late or wait for "
            "processor time: unset CUDA_DEVICE_MAX_CONNECTIONS=1, leave a core per rank free, look at --scmoe-trace"
        )
        return
    longer = {"pos1": "pos2 or pos3", "pos2": "pos3"}.get(config.position) if config.has_shortcut else None
    if config.moe_every == 1:
        longer = None
    remedies = [f'"position": {longer} has a longer window'] if longer else []
    if config.join == "end" and config.is_scheduled:
        remedies.append('"join": "late" lets the combine go on beside the next attention')
    if config.dispatch == "padded":
        remedies.append(f'"dispatch": "exact" or less than "capacity_factor": {config.capacity_factor:g} sends less')
    if config.wire_dtype is None:
        remedies.append('"wire_dtype": "bf16" or "fp8" sends fewer bytes')
    if config.overlap.num_chunks == 1:
        remedies.append('"num_chunks": "auto" also hides communication behind the experts')
    remedies.append("expert parallelism within a node exchanges faster")
    yield f"the window is too short ({between} per micro-batch): {'; '.join(remedies)}"


def _slower_layer(found: Measured) -> str:
    """Why the layer itself is slower than DeepSpeed's: the timed parts say it."""
    names = ("gate", "encode", "decode")
    fixed_ms = sum(
        layers * sum(total_ms(getattr(each, name), "train") for name in names) for each, layers in found.times
    )
    experts_ms = sum(layers * _total(each, "experts") for each, layers in found.times)
    shared_ms = sum(
        layers * sum(total_ms(each, "train") for each in times.backbone if each.kind in SHARED)
        for times, layers in found.times
    )
    parts = f"experts {experts_ms:.1f} ms, shared expert {shared_ms:.1f} ms, gate, encode and decode {fixed_ms:.1f} ms"
    if fixed_ms > LARGE_OVERHEAD * (fixed_ms + experts_ms + shared_ms):
        advice = "a larger micro-batch makes what a layer costs in any case a smaller part"
    elif found.config.dispatch == "padded":
        advice = '"dispatch": "exact" computes real tokens only'
    else:
        advice = "a smaller expert computes less, and more communication to hide makes up for it"
    return f"the layer itself is slower than {found.baseline} ({parts} per micro-batch): {advice}"


def details(found: Measured) -> list[str]:
    """The table of steps, and what was hidden in each pass."""
    named = {OURS: f"{found.config.architecture}", SERIAL: "the same without overlap", DEEPSPEED: found.baseline}
    rounds = len(found.seconds[OURS])
    lines = [f"whole steps, ms: median (10th–90th percentile) of {rounds} interleaved rounds, slowest rank"]
    for variant, seconds in found.seconds.items():
        each = Spread.of([1e3 * s for s in seconds])
        lines.append(f"  {named[variant]:<26} {each.median:9.1f}  ({each.p10:.1f}–{each.p90:.1f})")
    if SERIAL not in found.seconds:
        return lines
    for phase in PHASES:
        each_ms = found.hidden[phase]
        lines.append(
            f"{phase}: {100 * each_ms.share:.0f} % of the communication hidden, {each_ms.exposed_ms:.1f} of "
            f"{each_ms.communication_ms:.1f} ms per step exposed"
        )
    return [*lines, f"communication, timed alone, is {100 * found.communication_share:.1f} % of a step without overlap"]


def _total(times: OperatorTimes, *names: str) -> float:
    return sum(total_ms(getattr(times.chunks[1], name), "train") for name in names)


def _backbone_ms(times: OperatorTimes) -> float:
    # If the next pair's dispatch is on the way, too, its first operators are beside both transfers.
    late = () if times.late is None or times.is_periodic else times.late.operators
    return sum(total_ms(operator, "train") for operator in (*times.backbone, *late))


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"
