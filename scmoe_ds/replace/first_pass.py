"""What the log says of replaced layers once the first forward pass has shown the operators behind their taps."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.moe.stages import StagedLayer
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.schedule_text import Scheduled, names_text, origin_of, schedule_lines
from scmoe_ds.replace.taps import Tap


class Replaced(Scheduled, Protocol):
    """A replaced layer's pair, as far as these words need it."""

    name: str
    layer: StagedLayer
    tap: Tap
    overlap: OverlapConfig


class FirstPass:
    """Says what the first forward passes of replaced layers show: the operators behind the tap, and the schedule.

    Args:
        pairs: of all layers that were replaced together.

    Attributes:
        origin: who chooses the schedules, in words; None: the section.
    """

    def __init__(self, pairs: Iterable[Replaced]) -> None:
        self.pairs = list(pairs)
        self.origin: str | None = None
        self._is_cut: dict[bool, list[Replaced]] = {}
        self._missing = {training: len(self.pairs) for training in (True, False)}
        self._said: list[str] = []

    def of(self, pair: Replaced, training: bool, is_cut: bool) -> None:
        """Takes note of a layer's first pass, with gradients or without; speaks after the last layer's.

        Args:
            is_cut: whether an activation checkpoint begins between its tap and it.
        """
        self._missing[training] -= 1
        if is_cut:
            self._is_cut.setdefault(training, []).append(pair)
        if self._missing[training]:
            return
        if cut := self._is_cut.pop(training, []):
            names, taps = names_text([pair.name for pair in cut]), names_text([pair.tap.module_name for pair in cut])
            text = f"{names}: an activation checkpoint begins between it and its tap {taps}; it runs without overlap. "
            log(text + "Put both into one checkpoint", level=logging.WARNING)
            return
        exchanges = any(each.layer.transport.size > 1 for each in self.pairs)
        lines = schedule_lines(self.pairs, self.origin or origin_of(self.pairs[0].overlap, exchanges))
        if lines != self._said:
            log(*lines)
            self._said = lines
