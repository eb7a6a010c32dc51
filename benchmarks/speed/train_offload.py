"""Optimizer steps of a GPT with its experts in memory, on the host and in a file; one process.

    python -m benchmarks.speed.train_offload --output benchmarks/results

Two shapes: one whose windows are longer than the migration, and one with a few tokens. A unit is a few consecutive
steps and all that they have left to be done, so that no variant's migration falls into another's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

import scmoe_ds
from benchmarks.harness.measure import environment, environment_text
from benchmarks.harness.tables import table
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine import connect
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.initialization import initialize_parameters
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.offload.trainable import offloaded
from scmoe_ds.planner.rounds import Spread, interleave

STEPS = 3
RESIDENT, AGAIN = "in memory", "in memory again"
VARIANTS: dict[str, dict[str, Any] | None] = {
    RESIDENT: None,
    AGAIN: None,
    "host": {"device": "cpu"},
    "file": {"device": "nvme"},
}


@dataclass(frozen=True)
class Shape:
    """A model and its micro-batches.

    Attributes:
        width: hidden size; an expert is four times as wide.
        experts: of each of two MoE layers.
        sequences, tokens, accumulation: of a step.
    """

    width: int
    experts: int
    sequences: int
    tokens: int
    accumulation: int = 1


SHAPES = {"long windows": Shape(256, 8, 8, 256), "few tokens": Shape(256, 8, 1, 64)}


class Run:
    """An engine and its data."""

    def __init__(self, shape: Shape, offload: dict[str, Any] | None) -> None:
        section: dict[str, Any] = {"num_experts": shape.experts, "overlap": {"calibration_steps": 0, "num_chunks": 1}}
        if offload is not None:
            section["offload_experts"] = {**offload, "buffer_count": shape.experts}
        whole = {
            "train_micro_batch_size_per_gpu": shape.sequences,
            "gradient_accumulation_steps": shape.accumulation,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},
            "scmoe": section,
        }
        settings = GPTSettings(4, shape.width, 4, 512, shape.tokens)
        model = GPT(settings, ScMoEConfig.from_deepspeed(whole))
        initialize_parameters(model, 1, 0.02, 4)
        self.shape, self.engine = shape, scmoe_ds.initialize(model=model, config=whole)[0]
        self.losses: list[float] = []
        self.window_s = {"forward": 0.0, "backward": 0.0}
        for experts in offloaded(self.engine.module):
            self._watch(experts, "announce", "run", "forward")
            self._watch(experts, "_recall", "take_back", "backward")

    @property
    def moved(self) -> Any:
        """The offloaded experts' store and states; None where they are in memory."""
        found = offloaded(self.engine.module)
        return found[0] if found else None

    def _watch(self, experts: Any, asks: str, needs: str, name: str) -> None:
        """Adds up the time between two calls."""
        asked, needed, begun = getattr(experts, asks), getattr(experts, needs), list[float]()

        def when_asked(*arguments: Any) -> Any:
            begun[:] = [time.perf_counter()]
            return asked(*arguments)

        def when_needed(*arguments: Any) -> Any:
            if begun:
                self.window_s[name] += time.perf_counter() - begun.pop()
            return needed(*arguments)

        setattr(experts, asks, when_asked)
        setattr(experts, needs, when_needed)

    def step(self) -> None:
        """One step of the optimizer."""
        generator = torch.Generator().manual_seed(len(self.losses))
        for _ in range(self.shape.accumulation):
            tokens = torch.randint(512, (self.shape.sequences, self.shape.tokens + 1), generator=generator)
            torch.manual_seed(len(self.losses))
            loss = self.engine(tokens[:, :-1], labels=tokens[:, 1:]).loss
            self.engine.backward(loss)
            self.engine.step()
        self.losses.append(float(loss.detach()))

    def unit(self) -> None:
        """Some steps, and what they have left to be done."""
        for _ in range(STEPS):
            self.step()
        if self.moved is not None:
            self.moved.states.finish()

    def migration_ms(self) -> dict[str, float]:
        """How long all experts take with nothing beside them: with the step that is due, and the weights alone."""
        self.step()
        started = time.perf_counter()
        self.moved.states.finish()
        stepped, store = time.perf_counter() - started, self.moved.store
        store.renew([])
        keys = self.moved.states.keys
        started = time.perf_counter()
        for key in keys:
            store.fetch([key])
            store.take(key)
            store.release(key)
        return {"forward": 1e3 * stepped, "backward": 1e3 * (time.perf_counter() - started)}


def measure(shape: Shape, rounds: int, directory: str) -> dict[str, Any]:
    """Of one shape: times, windows and migrations."""
    runs = {}
    for name, offload in VARIANTS.items():
        path = {"nvme_path": directory} if offload is not None and offload["device"] == "nvme" else {}
        runs[name] = Run(shape, None if offload is None else {**offload, **path})
    units: dict[str, Callable[[], object]] = {name: run.unit for name, run in runs.items()}
    times = interleave(units, rounds, warm_up=2)
    steps = len(runs[RESIDENT].losses)
    rows: dict[str, Any] = {}
    for name, run in runs.items():
        rows[name] = {
            "step_ms": asdict(Spread.of([1e3 * each / STEPS for each in times[name]])),
            "speed": asdict(Spread.of_ratios(times[RESIDENT], times[name])),
            "same_losses": run.losses == runs[RESIDENT].losses,
        }
        if run.moved is not None:
            counts, taken = run.moved.store.counts, {part: 1e3 * s / steps for part, s in run.window_s.items()}
            rows[name] |= {
                "window_ms": taken,
                "waited_ms": 1e3 * counts.waited_s / steps,
                "fetched_mb": counts.migrated_bytes / steps / 1e6,
                "hits": counts.hits / counts.used,
            }
    for name, run in runs.items():
        if run.moved is not None:
            found = [run.migration_ms() for _ in range(3)]
            rows[name]["migration_ms"] = {part: statistics.median(each[part] for each in found) for part in found[0]}
    return {"shape": asdict(shape), "rows": rows}


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["# Training with offloaded experts", "", f"`{record['command']}`", ""]
    lines += [f"{environment_text(record['environment'])}. {record['rounds']} rounds.", ""]
    header = ("experts", "step, ms (p10–p90)", "speed", "windows, ms", "migration, ms", "waited, ms", "same losses")
    for name, found in record["shapes"].items():
        shape = Shape(**found["shape"])
        lines += [f"## {name[0].upper()}{name[1:]}", "", _text(shape), ""]
        lines += [*table(header, [_cells(variant, row) for variant, row in found["rows"].items()]), ""]
    lines += [
        "Speed: of the same round's experts in memory, median and p10–p90. Windows: time of a step between asking for "
        "a layer's experts and their computation, forward + backward. Migration: of all experts with nothing beside "
        "it, with the step + weights alone; the step is part of the work in memory too. Waited: what of it was "
        "not hidden.",
    ]
    return "\n".join(lines) + "\n"


def _text(shape: Shape) -> str:
    return (
        f"GPT of 4 blocks, hidden size {shape.width}, 2 × {shape.experts} experts, {shape.sequences} × {shape.tokens} "
        f"tokens and {shape.accumulation} micro-batch(es) a step, fp32, AdamW."
    )


def _cells(name: str, row: dict[str, Any]) -> Sequence[str]:
    step, speed = Spread(**row["step_ms"]), Spread(**row["speed"])
    moved = ["–"] * 3
    if "window_ms" in row:
        moved = [" + ".join(f"{ms:.0f}" for ms in row[key].values()) for key in ("window_ms", "migration_ms")]
        moved.append(f"{row['waited_ms']:.0f}")
    spread = f"{step.median:.0f} ({step.p10:.0f}–{step.p90:.0f})"
    return [name, spread, f"{speed.median:.2f} ({speed.p10:.2f}–{speed.p90:.2f})", *moved, _yes(row["same_losses"])]


def _yes(same: bool) -> str:
    return "bit for bit" if same else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--nvme-path", default=tempfile.gettempdir(), help="directory for the file")
    parser.add_argument("--output", type=Path, help="directory for train_offload.md and .json")
    args = parser.parse_args()
    logger.setLevel("ERROR")
    connect()
    shapes = {name: measure(shape, args.rounds, args.nvme_path) for name, shape in SHAPES.items()}
    command = f"python -m benchmarks.speed.train_offload --rounds {args.rounds} --output benchmarks/results"
    record = {"command": command, "environment": environment(), "rounds": args.rounds, "shapes": shapes}
    print(text := page(record))
    if args.output is not None:
        (args.output / "train_offload.md").write_text(text, encoding="utf-8")
        (args.output / "train_offload.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
