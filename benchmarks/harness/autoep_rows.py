"""The rows of the benchmark against AutoEP: one model's weights, run by AutoEP and by this package in several ways."""

from __future__ import annotations

import copy
import json
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness.autoep_parts import Step, autoep_layers
from benchmarks.harness.families import Family
from benchmarks.harness.no_link import Arrived, LocalCopy, without_link
from benchmarks.harness.parts import CPU
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.attach import give_pairs
from scmoe_ds.moe import routed
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.planner.auto import chunk_counts
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.rounds import over_ranks
from scmoe_ds.planner.simulation import Mode, total_ms
from scmoe_ds.replace import autoep, longcat
from scmoe_ds.replace.adapted_parts import has_parts
from scmoe_ds.trace.recorder import SILENT, Recorder

AUTOEP, AGAIN = "AutoEP", "AutoEP again (A/A)"
SAMPLES = 3
"""Timed steps for each number of chunks."""


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        architecture: "autoep" (DeepSpeed's own layers), "as_is" or "scmoe".
        overlap: fields of the section's "overlap" that differ from their defaults.
        one_copy: a token travels once to each rank; otherwise once for each of its experts.
        fields: others of the section.
        limit: name of the row that computes the same without communication.
        blocking: name of the row that communicates the same, and waits for it.
        communicates: False: nothing is sent.
        modes: in which it is measured.
    """

    architecture: str
    overlap: dict[str, Any] = field(default_factory=dict, hash=False)
    one_copy: bool = True
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    limit: str | None = None
    blocking: str | None = None
    communicates: bool = True
    modes: tuple[Mode, ...] = ("train", "forward")

    @property
    def section(self) -> ScMoEConfig:
        """The "scmoe" section of this package's rows."""
        written = {"overlap": self.overlap, **self.fields}
        written["architecture"] = "as_is" if self.architecture == "autoep" else self.architecture
        return ScMoEConfig.from_deepspeed({"expert_parallel": {"enabled": True}, "scmoe": written})

    @property
    def parts(self) -> str:
        """Rows of equal parts have the same parameters."""
        if not has_parts(self.section):
            return ""
        return json.dumps([self.fields.get(name) for name in ("merge", "shortcut_norm", "adapt")])


SHORTCUT = {"position": "pos1", "merge": "add", "shortcut_norm": "shared"}
LATE = {"join": "late"}


def table(family: Family) -> dict[str, Row]:
    """AutoEP; the same model with one thing added at a time; and the shortcut."""
    one, blocking, train = {"num_chunks": 1}, {"enabled": False}, ("train",)
    bare = "as_is, no communication"
    # Without shared experts there is nothing beside the experts in one chunk.
    has_window = family.model_type == longcat.FAMILY or "n_shared_experts" in family.counts
    overlapped = Row("as_is", one, limit=bare, blocking="+ one copy per rank", modes=train)
    return {
        AUTOEP: Row("autoep", limit="AutoEP, no communication"),
        AGAIN: Row("autoep"),
        "AutoEP, no communication": Row("autoep", communicates=False, modes=train),
        "as_is, blocking, a copy per expert": Row("as_is", blocking, one_copy=False, limit=bare, modes=train),
        "+ one copy per rank": Row("as_is", blocking, limit=bare),
        **({"+ overlap": overlapped} if has_window else {}),
        "+ chunks = as_is": Row("as_is", limit=bare, blocking="+ one copy per rank"),
        bare: Row("as_is", one, communicates=False),
        **({} if family.model_type == longcat.FAMILY else _shortcuts()),
    }


def _shortcuts() -> dict[str, Row]:
    """The routed experts read the preceding block's output, beside attention and shared experts. Another function."""
    serial, bare = "scmoe Pos-1, blocking", "scmoe Pos-1, no communication"
    return {
        serial: Row("scmoe", {"enabled": False}, fields=SHORTCUT, limit=bare, modes=("train",)),
        "scmoe Pos-1": Row("scmoe", fields=SHORTCUT, limit=bare, blocking=serial),
        "scmoe Pos-1, late join": Row("scmoe", fields=SHORTCUT | LATE, limit=bare, blocking=serial),
        bare: Row("scmoe", {"num_chunks": 1}, fields=SHORTCUT, communicates=False),
    }


def adapted(family: Family) -> dict[str, Row]:
    """The teacher, and what `scmoe adapt` makes of it: norms of the shortcuts' own, all layers or every second, with
    and without a shared expert that the teacher has not."""
    top_k = family.config(family.slow).num_experts_per_tok
    kinds = {
        "": {},
        "half of the layers": {"adapt": {"layers": list(range(1, family.blocks, 2))}},
        **{
            f"shared expert, top-{k}": {"merge": "cg1", "top_k": k, "adapt": {"shared_expert": "mean"}}
            for k in (top_k - 1, top_k)
        },
    }
    rows = {AUTOEP: Row("autoep"), AGAIN: Row("autoep"), "as_is": Row("as_is")}
    for name, more in kinds.items():
        fields, behind = {**SHORTCUT, "shortcut_norm": "own", **more}, f", {name}" if name else ""
        blocking, bare = f"blocking{behind}", f"no communication{behind}"
        rows[blocking] = Row("scmoe", {"enabled": False}, fields=fields, limit=bare)
        rows[f"Pos-1{behind}"] = Row("scmoe", fields=fields, limit=bare, blocking=blocking)
        rows[f"late join{behind}"] = Row("scmoe", fields=fields | LATE, limit=bare, blocking=blocking)
        rows[bare] = Row("scmoe", {"num_chunks": 1}, fields=fields, communicates=False)
    return rows


class Run:
    """A row, ready to run: a copy of the model with the same parameters.

    Args:
        row: what to run.
        model: with AutoEP's layers, as DeepSpeed makes them.
        method: the all-to-all of this package's layers.

    Attributes:
        pairs: of the layers that this package runs.
    """

    def __init__(self, row: Row, model: nn.Module, method: str) -> None:
        self.row, self.model = row, _same_weights(model)
        self.calibrator: Calibrator | None = None
        self.pairs: list[Any] = []
        self._arrived = Arrived()
        if row.architecture == "autoep":
            return
        section = row.section
        self.overlap = section.overlap
        layers = [autoep.schedule(name, layer, None) for name, layer in autoep.autoep_layers(self.model)]
        for layer in layers:
            kind = type(layer.transport) if row.communicates else LocalCopy
            layer.transport = kind(layer.transport.group, method)
        give_pairs(self.model, layers, section)
        self.pairs = [layer.pair for layer in layers]

    def step(self, hidden: Tensor, train: bool) -> Step:
        """One forward pass of the blocks, or one forward and backward pass; no all-reduce of dense gradients.

        Args:
            hidden: [B, S, D] what the first block reads.
        """
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        hidden, blocks = hidden.clone(), self.model.get_submodule("model")

        def run() -> None:
            with self._link():
                if not train:
                    with torch.no_grad():
                        blocks(inputs_embeds=hidden, use_cache=False)
                    return
                output = blocks(inputs_embeds=hidden.requires_grad_(), use_cache=False).last_hidden_state
                (output * direction).sum().backward()
            self.model.zero_grad(set_to_none=True)
            hidden.grad = None

        return run

    def output(self, hidden: Tensor) -> Tensor:
        """[B, S, D] what the blocks make of `hidden`, without gradients."""
        with torch.no_grad(), self._link():
            blocks = self.model.get_submodule("model")
            return cast(Tensor, blocks(inputs_embeds=hidden, use_cache=False).last_hidden_state)

    def _link(self) -> AbstractContextManager[None]:
        if self.row.architecture == "autoep" and not self.row.communicates:
            return without_link(self._arrived)
        if self.row.one_copy:
            return nullcontext()
        return mock.patch.object(routed, "one_row_per_rank", lambda k, slices: False)

    def calibrate(self, step: Step) -> None:
        """Has the package time its parts and choose its schedules at the link's present rate, as in any training.

        Args:
            step: a training step.
        """
        if self.pairs:  # hooks learn from a first pass which operators there are
            step()
        if not (self.pairs and self.row.communicates):
            return
        steps = SAMPLES * len(chunk_counts(self.overlap))
        calibrator = Calibrator(self.pairs, self.overlap.model_copy(update={"calibration_steps": steps}), CPU)
        while calibrator.calibrating or calibrator.comparison is not None:
            calibrator.begin()
            step()
        calibrator.settle()
        self.calibrator = calibrator

    def communication_ms(self, mode: Mode) -> float | None:
        """Dispatch and combine of all layers, one chunk, with nothing beside them; None: not timed."""
        if self.calibrator is None or not self.calibrator.times:
            return None
        found = 0.0
        for kind in self.calibrator.kinds:
            assert kind.times is not None
            one = kind.times.chunks[1]
            found += len(kind.layers) * (total_ms(one.dispatch, mode) + total_ms(one.combine, mode))
        return found

    def waited_ms(self, step: Step, steps: int = 5) -> float | None:
        """How long the computation stands still for exchanges in a step: median, of the slower rank. Collective.

        What transfers cost the computation beside them is no part of it. None: of AutoEP's own layers.
        """
        if not self.pairs:
            return None
        found = []
        for _ in range(steps):
            dist.barrier()
            recorder = Recorder(CPU, regions=False)
            for number, pair in enumerate(self.pairs):
                pair.recorder = recorder.pair(number)
            step()
            found.append(sum(span.duration_ms for span in recorder.spans() if span.lane == "wait"))
        for pair in self.pairs:
            pair.recorder = SILENT
        return over_ranks([statistics.median(found)])[0]

    def schedules(self, mode: Mode) -> list[Schedule]:
        """Of each pair, in this mode."""
        return [
            pair.forward_schedule if mode == "forward" and pair.forward_schedule is not None else pair.schedule
            for pair in self.pairs
        ]


def _same_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters, and process groups, are those of the model."""
    kept: list[Any] = [*model.parameters(), *(layer.ep_group for layer in autoep_layers(model))]
    return copy.deepcopy(model, {id(each): each for each in kept})
