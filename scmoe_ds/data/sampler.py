"""Which samples a rank reads, in Megatron's order, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from scmoe_ds.compat import default_timeout
from scmoe_ds.errors import DataError
from scmoe_ds.parallel.launchers import end_with_parent

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "images")


@dataclass(frozen=True)
class PretrainingSampler(Sampler[list[int]]):
    """Sample indices of one data-parallel rank, one micro-batch at a time, in Megatron's order.

    Global micro-batch ``g`` begins at sample ``consumed_samples + g * micro_batch_size``. Rank ``r`` of ``N`` takes
    micro-batches ``r, r + N, r + 2N, ...``. One process that accumulates two micro-batches therefore sees in a step
    what two processes with one each see, and a run can resume on another number of ranks. Every rank gets the same
    number of micro-batches; an incomplete last round is dropped.

    Attributes:
        num_samples: length of the dataset.
        micro_batch_size: samples of one rank in one forward pass.
        data_parallel_rank, data_parallel_size: this rank among those that read different data.
        consumed_samples: samples that all ranks together have already trained on.

    Raises:
        DataError: an argument is out of range, or more is consumed than the dataset has.
    """

    num_samples: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    consumed_samples: int = 0

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise DataError(f"train_micro_batch_size_per_gpu is {self.micro_batch_size}: it must be at least 1.")
        if not 0 <= self.data_parallel_rank < self.data_parallel_size:
            raise DataError(
                f"data-parallel rank {self.data_parallel_rank} is outside 0..{self.data_parallel_size - 1}: "
                "pass the rank and size of the same group."
            )
        if not 0 <= self.consumed_samples <= self.num_samples:
            raise DataError(
                f"{self.consumed_samples} samples are already consumed, but the dataset has {self.num_samples}: "
                "build it with the samples of the whole run (--train-iters times the global batch size)."
            )

    def __len__(self) -> int:
        """Micro-batches left for each rank."""
        left = self.num_samples - self.consumed_samples
        return left // (self.micro_batch_size * self.data_parallel_size)

    def __iter__(self) -> Iterator[list[int]]:
        for round_index in range(len(self)):
            g = round_index * self.data_parallel_size + self.data_parallel_rank
            first = self.consumed_samples + g * self.micro_batch_size
            yield list(range(first, first + self.micro_batch_size))


def pretraining_batches(
    dataset: Dataset[Any], *, num_workers: int = 0, **sampling: int
) -> DataLoader[dict[str, torch.Tensor]]:
    """A loader over this rank's micro-batches, each a dict of CPU tensors of B samples of length S.

    Keys: ``tokens`` int64 [B, S], ``labels`` int64 [B, S] (tokens one later), ``loss_mask`` float32 [B, S]; of image
    sets ``images`` [B, C, H, W] and ``labels`` int64 [B] instead.
    The loader is finite, has a length, and does not wrap around.

    Args:
        dataset: one of ``build_datasets``'s; any map-style dataset of dicts with these keys.
        num_workers: background processes, 0 for none. When a worker gives nothing for the timeout of collectives, the
            loader raises a RuntimeError. Workers end with the process that reads them, even those that are stopped.
        sampling: as ``PretrainingSampler``.

    Raises:
        DataError: as ``PretrainingSampler``.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    return DataLoader(
        dataset,
        batch_sampler=PretrainingSampler(num_samples, **sampling),
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
        timeout=default_timeout().total_seconds() if num_workers else 0,
        worker_init_fn=_end_with_the_rank,
    )


def _end_with_the_rank(_: int) -> None:
    end_with_parent()


def _stack(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    # Blends add "dataset_id" and GPTDataset "position_ids"; the model needs neither.
    return {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS if key in samples[0]}
