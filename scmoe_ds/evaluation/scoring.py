"""Computes log likelihoods of given tokens, in batches that are divided over the data-parallel ranks.

Shape suffixes: B rows, S tokens of each, D hidden, T scored tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.evaluation.windows import Row
from scmoe_ds.inference.passes import used_tokens
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.experts import to_device
from scmoe_ds.parallel.tensor import ModelParallelUnit, data_parallel_rank, data_parallel_size
from scmoe_ds.planner.calibrator import Calibrator, one_pass
from scmoe_ds.planner.simulation import Mode

T = TypeVar("T")

_LOGITS_AT_ONCE = 512
"""Tokens whose logits are in memory together: 100 MB of fp32 with a vocabulary of 50 000."""


class Scorer:
    """Scores rows with a model of `scmoe_ds.inference.model.load_model`.

    Args:
        model: this rank's part, in evaluation mode; a GPT, or what is called like one.
        batch_size: rows that this rank reads together.
        vocab_size: tokens of the tokenizer; greedy decoding never chooses padding tokens. Log likelihoods are over the
            whole padded vocabulary, as in training. None means no padding.
        calibrators: the passes run under the schedules of the "prefill" one; None keeps the model's schedules.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int = 8,
        vocab_size: int | None = None,
        calibrators: Mapping[Mode, Calibrator] | None = None,
    ) -> None:
        self.model, self.batch_size, self.vocab_size = model, batch_size, vocab_size
        self.calibrators = calibrators or {}
        self.device = model.embedding.weight.device

    @torch.inference_mode()
    def score(self, rows: Sequence[Row]) -> Tensor:
        """One forward pass. Collective over expert- and tensor-parallel ranks, which may have different rows.

        Args:
            rows: of any lengths. Without rows the pass only serves other ranks' tokens.

        Returns:
            [B, 2] float64 on the host: for each row the nats of all its labels (their negative log likelihood), and the
            number of labels that greedy decoding would choose.
        """
        lengths = [len(row.tokens) for row in rows]
        # Padding comes after a row's tokens, which do not attend to it, and no expert gets it.
        tokens_BS = torch.zeros(max(len(rows), 1), max(lengths, default=1), dtype=torch.int64)
        for number, row in enumerate(rows):
            tokens_BS[number, : len(row.tokens)] = torch.from_numpy(np.array(row.tokens))
        with one_pass(self.calibrators, "prefill"):
            used_BS = used_tokens(lengths or [0], tokens_BS.shape[1], self.device)
            hidden_BSD = self.model.hidden_states(to_device(tokens_BS, self.device), used_token=used_BS)
        sums_B2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        if not rows:
            return sums_B2
        scored = [len(row.labels) for row in rows]
        row_T = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(scored))
        place_T = torch.cat([torch.arange(S - K, S) for S, K in zip(lengths, scored, strict=True)])
        label_T = torch.from_numpy(np.concatenate([row.labels for row in rows]))
        for chunk in torch.arange(len(row_T)).split(_LOGITS_AT_ONCE):
            chunk_T, at_T, label = (to_device(each[chunk], self.device) for each in (row_T, place_T, label_T))
            logits_TV = self.model.logits(hidden_BSD[chunk_T, at_T]).float()
            nats_T = F.cross_entropy(logits_TV, label, reduction="none").double()
            greedy_T = (logits_TV[:, : self.vocab_size].argmax(1) == label).double()
            sums_B2.index_add_(0, row_T[chunk], torch.stack([nats_T, greedy_T], dim=1).cpu())
        return sums_B2

    def score_all(self, rows: Sequence[Row]) -> Tensor:
        """[N, 2] as `score`, for any number of rows and in their order, on every rank.

        Collective over the world: every rank passes the same rows.
        """
        sums_N2 = torch.zeros(len(rows), 2, dtype=torch.float64)
        longest_first = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))  # little padding
        for numbers in self.own_batches(longest_first, len(rows)):
            sums_N2[numbers] = self.score([rows[number] for number in numbers]).clone()
        return self.sum_over_replicas(sums_N2)

    def own_batches(self, items: Iterable[T], count: int) -> Iterator[list[T]]:
        """This data-parallel rank's share of `count` items, at most `batch_size` at a time.

        Every rank gets as many batches, some of them empty: expert-parallel ranks serve each other in every pass.
        """
        rank, ranks = replica()
        rest = iter(items)
        for _ in range(-(-count // (self.batch_size * ranks))):
            yield list(islice(rest, self.batch_size * ranks))[rank::ranks]

    def sum_over_replicas(self, values: Tensor) -> Tensor:
        """Sums over the data-parallel ranks. Tensor-parallel ranks hold the same numbers and count once."""
        if replica()[1] == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total, group=ModelParallelUnit.get_data_parallel_group())
        return total.cpu()


def replica() -> tuple[int, int]:
    """This rank's number among the data-parallel ranks, and their count."""
    return (data_parallel_rank(), data_parallel_size()) if dist.is_initialized() else (0, 1)
