"""Which samples a rank reads, in Megatron's order, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from scmoe_ds.errors import DataError
from scmoe_ds.parallel.launchers import end_with_parent
from scmoe_ds.parallel.timeouts import limit_s

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "images")


class PretrainingSampler(Sampler[list[int]]):
    """Sample indices of one data-parallel rank, one micro-batch at a time, in Megatron's order.

    Global micro-batch ``g`` is samples ``consumed_samples + g * micro_batch_size`` and following; rank
    ``r`` of ``N`` takes micro-batches ``r, r + N, r + 2N, ...``. So one process that accumulates two
    micro-batches sees in a step what two processes with one each see, and a run can resume on another
    number of ranks. Every rank gets the same number of micro-batches; an incomplete last round is dropped.

    Args:
        num_samples: length of the dataset.
        micro_batch_size: samples of one rank in one forward pass.
        data_parallel_rank, data_parallel_size: this rank among those that read different data.
        consumed_samples: samples that all ranks together have already trained on.

    Raises:
        DataError: an argument is out of range, or more is consumed than the dataset has.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
    ) -> None:
        if micro_batch_size < 1:
            raise DataError(f"train_micro_batch_size_per_gpu is {micro_batch_size}: it must be at least 1.")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(
                f"data-parallel rank {data_parallel_rank} is outside 0..{data_parallel_size - 1}: pass the "
                "rank and size of the same group."
            )
        if not 0 <= consumed_samples <= num_samples:
            raise DataError(
                f"{consumed_samples} samples are already consumed, but the dataset has {num_samples}: build "
                "it with the samples of the whole run (--train-iters times the global batch size)."
            )
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.consumed_samples = consumed_samples

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
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
    num_micro_batches: int | None = None,
) -> DataLoader[dict[str, torch.Tensor]]:
    """A loader over this rank's micro-batches, each a dict of CPU tensors of B samples of length S.

    Keys: ``tokens`` int64 [B, S], ``labels`` int64 [B, S] (tokens one later), ``loss_mask`` float32 [B, S]; of image
    sets ``images`` [B, C, H, W] and ``labels`` int64 [B] instead.
    The loader is finite, has a length, and does not wrap around.

    Args:
        dataset: one of ``build_datasets``'s; any map-style dataset of dicts with these keys.
        num_workers: background processes, 0 for none. A worker that gives nothing for the timeout of collectives ends
            the run with a RuntimeError; workers end with the process that reads them, even those that are stopped.
        num_micro_batches: how many this rank is going to draw. Checked now, so that a dataset that is too
            short stops a run at its first step and not at its last; None skips the check.

    Others as ``PretrainingSampler``.

    Raises:
        DataError: as ``PretrainingSampler``, or fewer than ``num_micro_batches`` are left.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    sampler = PretrainingSampler(
        num_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        consumed_samples=consumed_samples,
    )
    if num_micro_batches is not None and len(sampler) < num_micro_batches:
        per_round = micro_batch_size * data_parallel_size
        raise DataError(
            f"the run asks each rank for {num_micro_batches} micro-batches ({num_micro_batches * per_round} "
            f"samples in all), but the dataset has {num_samples} samples, {consumed_samples} of them "
            f"consumed: enough for {len(sampler)}. Build the dataset with more samples."
        )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=torch.cuda.is_available(),
        timeout=limit_s() if num_workers else 0,
        worker_init_fn=_end_with_the_rank,
    )


def _end_with_the_rank(_: int) -> None:
    end_with_parent()


def _stack(samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    # Blends add "dataset_id" and GPTDataset "position_ids"; the model needs neither.
    return {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS if key in samples[0]}
