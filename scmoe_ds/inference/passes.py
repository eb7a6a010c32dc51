"""A model's forward passes in generation: one over the prompts of a batch, then one per token for all its rows.

Shape suffixes: B rows, S tokens of each, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from scmoe_ds.inference.kv_cache import KeyValueCache
from scmoe_ds.inference.offload import OffloadedExperts
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.experts import to_device
from scmoe_ds.planner.calibrator import Calibrator, one_pass
from scmoe_ds.planner.simulation import Mode
from scmoe_ds.planner.step_trace import StepTrace
from scmoe_ds.trace.recorder import SILENT, Recorder


class Passes:
    """
    Args:
        model: this rank's part.
        calibrators: of "prefill" and "decode"; none: the model's own schedules for both.
        trace: which pass is recorded, from 1; None: none.
        trace_dir: where its timeline goes.

    Attributes:
        calibrating: whether the schedule of the pass under way is not final yet.
        trace: the recording.
    """

    def __init__(self, model: GPT, calibrators: Mapping[Mode, Calibrator], trace: int | None, trace_dir: str) -> None:
        self.model, self.calibrators, self.calibrating = model, calibrators, False
        self.device = model.embedding.weight.device
        self.trace = StepTrace(self, trace, trace_dir)
        self._number = 0
        self._cache: KeyValueCache | None = None

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cache: KeyValueCache,
        serves_only: bool,
        images: Tensor | None = None,
    ) -> Tensor:
        """[B, V] logits of the token after each prompt; with `serves_only` the prompt only fills the batch.

        Args:
            images: [M, C, H, W] of the prompts' patch tokens (models/vision_language.py); None: there are none.
        """
        lengths = [len(prompt) for prompt in prompts]
        tokens_BS = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, : len(prompt)] = torch.tensor(prompt)
        used_BS = used_tokens([0] if serves_only else lengths, max(lengths), self.device)
        more = {} if images is None else {"images": to_device(images, self.device)}
        with self._pass("prefill"):
            positions_BS = cache.positions(max(lengths))
            hidden_BSD = self.model.hidden_states(to_device(tokens_BS, self.device), positions_BS, used_BS, **more)
        cache.advance(lengths)
        rows_B, last_B = torch.arange(len(prompts), device=self.device), torch.tensor(lengths) - 1
        return self.model.logits(hidden_BSD[rows_B, to_device(last_B, self.device)])

    def decode(self, tokens_B: Tensor, cache: KeyValueCache, goes_on: Sequence[bool]) -> Tensor:
        """[B, V] logits of the token after these. A row that does not go on stays where it is."""
        kept = list(map(int, goes_on))
        with self._pass("decode"):
            used_BS = used_tokens(kept, 1, self.device)
            hidden_BSD = self.model.hidden_states(tokens_B.unsqueeze(1), cache.positions(1), used_BS)
        cache.advance(kept)  # the place of a row that has ended is written over and over
        return self.model.logits(hidden_BSD[:, 0])

    def cache_for(self, rows: int, capacity: int) -> KeyValueCache:
        """One for all batches and calls, as long as it is large enough."""
        if self._cache is None or self._cache.rows < rows or self._cache.capacity < capacity:
            old = self._cache
            self._cache = None  # first: both need not fit at once
            rows, capacity = (max(rows, old.rows), max(capacity, old.capacity)) if old else (rows, capacity)
            del old
            self._cache = KeyValueCache(self.model, rows, capacity)
        return self._cache

    def record(self, recorder: Recorder | None) -> None:
        """Has pairs and offloaded experts report to a recorder, or to none."""
        for layer, pair in enumerate(self.model.scheduled_pairs()):
            pair.recorder = SILENT if recorder is None else recorder.pair(layer)
            experts = pair.layer.deepspeed_moe.experts
            if isinstance(experts, OffloadedExperts):
                experts.store.recorder = recorder

    @contextmanager
    def _pass(self, mode: Mode) -> Iterator[None]:
        self._number += 1
        calibrator = self.calibrators.get(mode)
        with one_pass(self.calibrators, mode):
            self.calibrating = calibrator is not None and calibrator.calibrating
            self.trace.begin(self._number)
            yield
            self.trace.end(self._number)


def used_tokens(lengths: Sequence[int], sequence: int, device: torch.device) -> Tensor | None:
    """[B, S] bool on the device: the tokens of rows of these lengths; None where none is padding."""
    if min(lengths) == sequence:
        return None
    return to_device(torch.arange(sequence) < torch.tensor(lengths).unsqueeze(1), device)
