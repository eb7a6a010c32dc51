"""How much of a transfer the schedule hides: a stand-in transfer on a stream of its own, in place of the all-to-all.

Three times of a training step of one pair: blocking, overlapped, and without any transfer. Hidden is what blocking
costs and overlapped does not. A transfer that is longer than the window cannot be hidden. So there is one that fits
into the window, of which the target speaks, and one of all rows.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from benchmarks.gpu import pairs, stand_in
from benchmarks.gpu.chrome_trace import STEP, ChromeTrace, measured_step
from benchmarks.gpu.notes import Notes
from benchmarks.gpu.pairs import finish, traced
from benchmarks.gpu.setting import LayerShape, Setting, layer_shapes, token_counts
from benchmarks.gpu.timing import text
from benchmarks.harness.no_link import LocalCopy
from scmoe_ds.comm.transport import Transport
from scmoe_ds.engine import connect
from scmoe_ds.models.pairs import StagedPair
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.parallel.process import device
from scmoe_ds.planner.rounds import Spread, interleave, over_ranks
from scmoe_ds.planner.schedule_text import schedule_text
from scmoe_ds.planner.times import OperatorTimes

FILLED = 0.6
"""How much of the window a fitting transfer takes."""


def run(notes: Notes, setting: Setting) -> None:
    """The step: both shapes."""
    connect()
    torch.manual_seed(0)
    hidden_shares: list[float] = []
    beside: list[float] = []
    for index, shape in enumerate(layer_shapes(setting)):
        bench = Bench(shape, setting)
        fitting = fitting_share(bench.calibrate(1.0))
        for share in dict.fromkeys((fitting, 1.0)):
            bench.calibrate(share)
            measured = bench.measure(notes, share)
            if share == fitting:
                hidden_shares.append(measured)
                notes.number("hidden share of a transfer that fits into the window", min(hidden_shares))
                beside += bench.trace(notes, f"_overlap_{index + 1}.json.gz")
                if beside:
                    notes.number("copies beside kernels, from the trace", min(beside))
        del bench


def fitting_share(times: OperatorTimes) -> float:
    """The share of the rows whose transfers fit before and behind the experts, if all rows take what was measured."""
    shares = []
    for phase in ("forward_ms", "backward_ms"):
        backbone = [getattr(operator, phase) for operator in times.backbone]
        best = max(min(sum(backbone[:cut]), sum(backbone[cut:])) for cut in range(len(backbone) + 1))
        longest = max(getattr(times.chunks[1].dispatch, phase), getattr(times.chunks[1].combine, phase))
        shares.append(FILLED * best / max(longest, 1e-6))
    return min(1.0, *shares)


class Bench:
    """One pair and its steps. With one rank a stand-in transfers its rows, with several the all-to-all.

    Args:
        ranks: that share the experts.
    """

    def __init__(self, shape: LayerShape, setting: Setting, ranks: int = 1) -> None:
        self.shape, self.setting = shape, setting
        sequence = setting.size(2048, 12)
        self.pair: StagedPair = pairs.build(shape, sequence, device(), expert_parallel_size=ranks)
        layer = self.pair.layer
        self.stand_in = stand_in.use([layer]) if ranks == 1 else None
        self.bare = Transport(None) if ranks == 1 else LocalCopy(layer.transport.group, layer.transport.method)
        inputs = [pairs.tokens(shape, device(), token_counts(setting)[-1], sequence) for _ in range(3)]
        steps = itertools.cycle([pairs.training_step(self.pair, hidden) for hidden in inputs])
        self.step = lambda: next(steps)()
        self.schedule = self.pair.schedule

    def calibrate(self, share: float = 1.0) -> OperatorTimes:
        """Times the parts and takes the planner's schedule.

        Args:
            share: of the rows, how many leave the card; all of them unless a stand-in transfers them.
        """
        if self.stand_in is not None:
            self.pair.layer.transport = self.stand_in.with_share(share)
        times = pairs.calibrate(self.pair, self.step, device())
        self.schedule = self.pair.schedule
        return times

    def measure(self, notes: Notes, share: float = 1.0) -> float:
        """The three times, interleaved, of the slower rank; returns the hidden share. Collective."""
        sending = self.pair.layer.transport

        def under(schedule: Schedule, transport: Transport) -> None:
            self.pair.schedule, self.pair.layer.transport = schedule, transport
            self.step()

        blocking = Schedule(self.schedule.expert_slot, self.schedule.num_chunks, overlap=False)
        units = {
            "blocking": lambda: under(blocking, sending),
            "overlapped": lambda: under(self.schedule, sending),
            "without transfer": lambda: under(self.schedule, self.bare),
        }
        times = interleave(units, self.setting.size(20, 2), before=dist.barrier)
        self.pair.schedule, self.pair.layer.transport = self.schedule, sending
        milliseconds = {name: [1e3 * value for value in over_ranks(values)] for name, values in times.items()}
        triples = list(zip(*milliseconds.values(), strict=True))
        transfers = Spread.of([slow - bare for slow, _, bare in triples])
        exposed = Spread.of([fast - bare for _, fast, bare in triples])
        hidden = 1 - exposed.median / transfers.median if transfers.median else float("nan")
        cells = {"shape": self.shape.name, "rows that leave the card": f"{share:.0%}"}
        cells |= {"schedule": schedule_text(self.schedule)}
        cells |= {f"{name} ms": text(Spread.of(values)) for name, values in milliseconds.items()}
        cells |= {"transfers ms": text(transfers), "exposed ms": text(exposed), "hidden": f"{hidden:.0%}"}
        notes.row("A training step of one pair", **cells)
        return hidden

    def trace(self, notes: Notes, ending: str) -> list[float]:
        """Writes a trace of one step; returns the share of the transfers beside other kernels, if there are any."""
        path = self.setting.file(ending)
        with traced(self.pair, path):
            for _ in range(2):
                self.step()
                finish()
            with measured_step():
                self.step()
                finish()
        notes.file(path.name)
        trace = ChromeTrace.read(path)
        (borders,) = trace.ranges(STEP)
        transfers = trace.host_copies() if self.stand_in is not None else trace.kernels("nccl")
        transfers = [each for each in transfers if borders.start <= each.start <= borders.end]
        share = trace.beside_kernels(transfers)
        cells = {"shape": self.shape.name, "file": path.name, "transfers": len(transfers)}
        shown = "–" if share is None else f"{share:.0%}"
        notes.row("Traces of a step", **cells, **{"of their time beside kernels": shown})
        return [] if share is None else [share]
