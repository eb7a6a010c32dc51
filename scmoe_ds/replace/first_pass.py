"""What the log says of replaced layers once the first forward pass has shown the operators behind their taps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.moe.stages import StagedLayer
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.schedule_text import Scheduled, names_text, origin_of, schedule_lines
from scmoe_ds.replace.taps import Tap


class Hooked(StagedLayer, Protocol):
    """A layer that hooks drive."""

    @property
    def runs_converted(self) -> bool:
        """Whether the pass that is going on runs as a ScMoE."""


class Replaced(Scheduled, Protocol):
    """A replaced layer's pair, as far as these words need it."""

    name: str
    layer: Hooked
    tap: Tap
    overlap: OverlapConfig


class FirstPass:
    """Says what the first forward passes of replaced layers show: the operators behind the tap, and the schedule.

    Args:
        pairs: number of an MoE layer to its pair, of all layers that were replaced together.

    Attributes:
        origin: who chooses the schedules, in words; None: the section.
    """

    def __init__(self, pairs: Mapping[int, Replaced]) -> None:
        self.pairs = dict(pairs)
        self.origin: str | None = None
        self._is_cut: dict[bool, list[Replaced]] = {}
        self._shown: dict[bool, set[str]] = {
            True: set(),
            False: set(),
        }  # paths of layers, by whether there are gradients
        self._said: list[str] = []

    def of(self, pair: Replaced, training: bool, is_cut: bool) -> None:
        """Takes note of a layer's first pass, with gradients or without; speaks after that of the last converted layer.

        Args:
            is_cut: whether an activation checkpoint begins between its tap and it.
        """
        self._shown[training].add(pair.name)
        if is_cut:
            self._is_cut.setdefault(training, []).append(pair)
        converted = {number: each for number, each in self.pairs.items() if each.layer.runs_converted}
        if any(each.name not in self._shown[training] for each in converted.values()):
            return
        if cut := self._is_cut.pop(training, []):
            names, taps = names_text([pair.name for pair in cut]), names_text([pair.tap.module_name for pair in cut])
            text = f"{names}: an activation checkpoint begins between it and its tap {taps}; it runs without overlap. "
            log(text + "Put both into one checkpoint", level=logging.WARNING)
            return
        exchanges = any(each.layer.transport.size > 1 for each in converted.values())
        lines = schedule_lines(converted, self.origin or origin_of(pair.overlap, exchanges))
        if lines != self._said:
            log(*lines)
            self._said = lines
