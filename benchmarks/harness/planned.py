"""Schedules as the package itself would choose them: its own calibration and planner, on a benchmark's pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.harness.parts import CPU, record_steps, sum_ms
from benchmarks.harness.variants import Table, Variant
from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.auto import CHUNK_COUNTS
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.plan import plan
from scmoe_ds.planner.simulation import Mode, simulate, total_ms
from scmoe_ds.planner.times import OperatorTimes, PassTimes
from scmoe_ds.trace.recorder import PHASES

SAMPLES = 3
"""Timed micro-batches for each number of chunks."""


@dataclass(frozen=True)
class Calibrated:
    """What was measured of one kind of pair, without anything overlapping.

    Attributes:
        times: from the shortcut to the join, by the package's calibration: what the planner reads.
        before_tap: all operators before the shortcut together; no plan has them, but every step.
    """

    times: OperatorTimes
    before_tap: PassTimes

    def communication(self) -> PassTimes:
        """Dispatch and combine in one chunk, with nothing beside them."""
        one = self.times.chunks[1]
        return PassTimes(
            forward_ms=one.dispatch.forward_ms + one.combine.forward_ms,
            backward_ms=one.dispatch.backward_ms + one.combine.backward_ms,
        )

    def communication_ms(self, mode: Mode) -> float:
        """With mode "train" the gradients' as well."""
        return total_ms(self.communication(), mode)

    def window_ms(self, mode: Mode) -> float:
        """All operators between shortcut and join."""
        return sum(total_ms(operator, mode) for operator in self.times.backbone)

    def predicted_ms(self, schedule: Schedule, mode: Mode) -> float:
        """The planner's time from shortcut to join, and the operators before. Simulated, from measured parts."""
        return simulate(self.times, schedule, mode).total_ms + total_ms(self.before_tap, mode)


def calibrate(run: StagedPair, step: Callable[[], None], several_chunks: bool) -> Calibrated:
    """Times the parts of a pair at the link's present rate.

    Args:
        step: one training step of `run`.
        several_chunks: time all numbers of chunks that "auto" chooses from; otherwise one chunk only.
    """
    counts = CHUNK_COUNTS if several_chunks else (1,)
    settings = OverlapConfig(num_chunks="auto" if several_chunks else 1, calibration_steps=SAMPLES * len(counts))
    calibrator = Calibrator([run], settings, CPU)
    while calibrator.calibrating:
        calibrator.begin()
        step()
    run.schedule = Schedule(1, overlap=False)
    steps = record_steps(run, step, SAMPLES)
    labels = {operator.label for operator in run.operators() if operator.before_tap}
    before = {
        f"{phase}_ms": sum_ms(steps, max, lambda span: span.phase == phase and span.name in labels)  # noqa: B023
        for phase in PHASES
    }
    return Calibrated(calibrator.times[0], PassTimes(**before))


def calibrate_kinds(
    table: Table, runs: Mapping[str, StagedPair], steps: Mapping[str, Callable[[], None]]
) -> dict[str, Calibrated]:
    """Calibrates one pair of every kind that this package runs.

    Args:
        runs, steps: for the table's rows, the pair and one training step of it.

    Returns:
        by `Variant.kind`.
    """
    found: dict[str, Calibrated] = {}
    for name, variant in table.items():
        if not variant.is_scheduled or not variant.communicates or variant.kind in found:
            continue
        several = any(other.kind == variant.kind and other.chunks != 1 for other in table.values())
        found[variant.kind] = calibrate(runs[name], steps[name], several)
    return found


def schedule_of(variant: Variant, times: OperatorTimes, mode: Mode) -> Schedule:
    """The planner's choice within what the variant leaves to it."""
    if not variant.overlap:
        return Schedule(1, overlap=False)
    counts = variant.chunks if isinstance(variant.chunks, tuple) else (variant.chunks,)
    plans = [plan(times, mode, variant.slots, count) for count in counts]
    return min(plans, key=lambda each: each.predicted.total_ms).schedule
