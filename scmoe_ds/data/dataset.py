"""From Megatron's data flags to train, validation and test datasets, through megatron-core.

Start here. ``flags.py`` reads --data-path and --split, ``indexed.py`` checks the files, and ``sampler.py``
gives each rank its micro-batches.

megatron-core keeps shuffled indices on disk. Rank 0 writes them while the others wait at a barrier of the
default process group; without a process group the one process does both. Its builder knows no
``parallel_state``: every rank builds every dataset, and the sampler alone decides who reads what.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import Dataset

from scmoe_ds.data.errors import DataError
from scmoe_ds.data.flags import parse_data_path, plain_split, split_document_ranges
from scmoe_ds.data.indexed import IndexedLayout, check_indexed_dataset, check_token_range, content_digest, read_layout
from scmoe_ds.data.sampler import PretrainingSampler, pretraining_batches
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.parallel.agreement import require_agreement, run_together

__all__ = [
    "DataSettings",
    "Datasets",
    "PretrainingSampler",
    "build_datasets",
    "check_indexed_dataset",
    "parse_data_path",
    "pretraining_batches",
    "split_document_ranges",
]

_SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSettings:
    """What ``build_datasets`` needs, under the names of Megatron's flags.

    Attributes:
        data_path: one prefix, several, or weight and prefix in turn (``--data-path``).
        split: shares of documents for train, valid and test, e.g. ``"969,30,1"``.
        seq_length: tokens of a sample; each is drawn with one more, for the last label.
        seed: of the shuffles, 0 to 2**32 - 1.
        tokenizer: the one the data was made with.
        data_cache_path: directory for the shuffled indices, shared by all nodes; None puts them beside
            each dataset, in ``<prefix>/cache``.
        eod_mask_loss: no loss where the input token is end-of-document.
    """

    data_path: tuple[str, ...]
    split: str
    seq_length: int
    seed: int
    tokenizer: Tokenizer
    data_cache_path: str | None = None
    eod_mask_loss: bool = False


@dataclass(frozen=True)
class Datasets:
    """Map-style datasets; None where no samples were asked for.

    A sample is a dict with ``tokens`` int64 [S], ``labels`` int64 [S], ``loss_mask`` float32 [S].
    """

    train: Dataset[Any] | None
    valid: Dataset[Any] | None
    test: Dataset[Any] | None


@dataclass
class _FingerprintedConfig(GPTDatasetConfig):
    data_fingerprint: str = ""


class PretrainingDataset(GPTDataset):
    """GPTDataset whose cached indices also depend on the data's index.

    megatron-core names the cache after the path only: rewrite a dataset in place and it goes on reading
    through the old indices, into wrong or missing documents.
    """

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "data_fingerprint"]


class _Builder(BlendedMegatronDatasetBuilder):
    @staticmethod
    def build_generic_dataset(
        cls: Any,  # the name that megatron-core gives this parameter of its static method
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        # With a cache path BlendedDataset asks for the rank even when there is no process group, and
        # fails. A blend's own index is quick to make, so a lone process does without that cache.
        if cls is BlendedDataset and not _is_distributed():
            args = (*args[:-1], replace(args[-1], path_to_cache=None))
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


@dataclass(frozen=True)
class _Inspection:
    """What every rank must have found alike before the first barrier of the builder."""

    request: str
    tokenizer: dict[str, Any]
    data_fingerprint: str
    content: tuple[str, ...]
    num_tokens: tuple[int, ...]


def build_datasets(settings: DataSettings, train_samples: int, valid_samples: int, test_samples: int) -> Datasets:
    """Check the data, then build the datasets; they repeat it as often as the samples asked for need.

    Collective: with an initialised process group every rank must call it with the same arguments, which
    is checked, and a problem that one rank finds is raised on all. Needs no megatron ``parallel_state``.
    Several prefixes without weights are blended in proportion to their tokens.

    Args:
        train_samples, valid_samples, test_samples: least length of each dataset, 0 for no dataset. For a
            resumable run ask for the samples of the whole run, because they shape the shuffle.

    Raises:
        DataError: as ``check_indexed_dataset`` and ``parse_data_path``; a split shorter than one sequence
            of ``seq_length + 1`` tokens; an unwritable or unshared cache; ranks that disagree.
    """
    samples = (train_samples, valid_samples, test_samples)
    inspection = run_together(lambda: _inspect(settings, samples))
    assert inspection is not None
    require_agreement("the training data", inspection.request)
    require_agreement("the tokenizer", inspection.tokenizer)
    require_agreement("the training data", (inspection.data_fingerprint, inspection.num_tokens, inspection.content))
    if not any(samples):
        return Datasets(None, None, None)
    config = _megatron_config(settings, samples, inspection)
    try:
        built = _Builder(PretrainingDataset, list(samples), lambda: True, config).build()
    except FileNotFoundError as error:
        raise DataError(
            f"rank {dist.get_rank() if _is_distributed() else 0} cannot see the index cache that rank 0 "
            f"wrote: {error.filename}. Set --data-cache-path to a directory that all nodes share."
        ) from error
    return Datasets(*built)


def documents_of(data: Any, samples: Sequence[int], shown: int = 4) -> list[str]:
    """The documents that samples of a data set were cut from, in words; empty for data of another make."""
    found: dict[str, list[int]] = {}
    for index in samples:
        source, position = data, index
        if isinstance(data, BlendedDataset):
            data[index]  # maps its index into memory
            source, position = data.datasets[data.dataset_index[index]], int(data.dataset_sample_index[index])
        if isinstance(source, GPTDataset):
            _, documents = source._query_document_sample_shuffle_indices(position)
            found.setdefault(source.dataset_path, []).extend(map(int, documents))
    texts = []
    for path, numbers in found.items():
        unique = list(dict.fromkeys(numbers))
        rest = f", … ({len(unique)} in all)" if len(unique) > shown else ""
        texts.append(f"documents {', '.join(map(str, unique[:shown]))}{rest} of {path}")
    return texts


def _megatron_config(
    settings: DataSettings, samples: tuple[int, int, int], inspection: _Inspection
) -> _FingerprintedConfig:
    prefixes, weights = parse_data_path(settings.data_path)
    if len(prefixes) == 1:
        weights = None
    elif weights is None:
        # megatron-core would weigh by length too, but cap the blend at one epoch, which ends a long run.
        weights = [float(num_tokens) for num_tokens in inspection.num_tokens]
    config = _FingerprintedConfig(
        random_seed=settings.seed,
        sequence_length=settings.seq_length,
        blend=(prefixes, weights),
        split=plain_split(settings.split),
        path_to_cache=settings.data_cache_path,
        tokenizer=settings.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=settings.eod_mask_loss,
        create_attention_mask=False,
        # A blend of k datasets rounds each share up, k extra samples at most, which the largest may
        # have to supply; the default of 0.5 % is too little for small or many datasets.
        mid_level_dataset_surplus=max(0.005, 2 * len(prefixes) / min(n for n in samples if n)),
        data_fingerprint=inspection.data_fingerprint,
    )
    assert config.split_matrix is not None
    # megatron-core counts epochs of an empty split forever, even for 0 samples: leave such splits out.
    config.split_matrix = [b if n else None for b, n in zip(config.split_matrix, samples, strict=True)]
    return config


def _inspect(settings: DataSettings, samples: tuple[int, int, int]) -> _Inspection:
    """Everything that can be wrong and is found without building."""
    if settings.seq_length < 1 or min(samples) < 0 or not 0 <= settings.seed < 2**32:
        raise DataError(
            f"--seq-length ({settings.seq_length}) must be at least 1, --seed ({settings.seed}) in "
            f"0..2**32-1, and the samples of train, valid and test {samples} not negative."
        )
    prefixes, _ = parse_data_path(settings.data_path)
    layouts = [read_layout(prefix) for prefix in prefixes]
    for layout in layouts:
        _check_split_lengths(layout, settings, samples)
        # The same files on every rank: one reader of all tokens is enough.
        if not _is_distributed() or dist.get_rank() == 0:
            check_token_range(layout, settings.tokenizer.vocab_size)
            _check_cache_writable(settings.data_cache_path or _default_cache(layout.prefix))
    request = (
        f"split {settings.split}, sequence length {settings.seq_length}, seed {settings.seed}, samples "
        f"{samples}, data path {' '.join(settings.data_path)}"
    )
    return _Inspection(
        request,
        dict(settings.tokenizer.unique_identifiers),
        " ".join(layout.fingerprint for layout in layouts),
        tuple(content_digest(layout) for layout in layouts),
        tuple(layout.num_tokens for layout in layouts),
    )


def _check_split_lengths(layout: IndexedLayout, settings: DataSettings, samples: Sequence[int]) -> None:
    ranges = split_document_ranges(settings.split, layout.lengths.size)
    for name, documents, wanted in zip(_SPLIT_NAMES, ranges, samples, strict=True):
        num_tokens = int(layout.lengths[documents.start : documents.stop].sum(dtype=np.int64))
        if wanted and num_tokens < settings.seq_length + 1:
            raise DataError(
                f"{layout.prefix}: the {name} split (--split {settings.split}) is {len(documents)} of "
                f"{layout.lengths.size} documents with {num_tokens} tokens, less than one sequence: "
                f"--seq-length {settings.seq_length} takes {settings.seq_length + 1}. Use more data, a "
                f"larger share in --split or a shorter --seq-length, or ask for no {name} samples."
            )


def _check_cache_writable(directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise DataError(
            f"cannot write the index cache in {directory}: {error.strerror}. Set --data-cache-path to a "
            "writable directory that all nodes share."
        ) from error


def _default_cache(prefix: str) -> str:
    return os.path.join(prefix, "cache", f"{PretrainingDataset.__name__}_indices")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
