"""From Megatron's data flags to train, validation and test datasets, through megatron-core.

Rank 0 builds the datasets and writes the indices; then the others read them. megatron-core's builder gets no
``parallel_state``: every rank builds every dataset, and the sampler alone decides which rank reads what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from scmoe_ds.compat import sequences_of
from scmoe_ds.data.indexed import IndexedLayout, check_token_range, content_digest, document_of, read_layout
from scmoe_ds.data.megatron_classes import Builder, FingerprintedConfig, PretrainingDataset
from scmoe_ds.data.sequences import unigram_entropy
from scmoe_ds.data.splits import parse_data_path, plain_split, split_ranges, split_shares
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import DataError
from scmoe_ds.parallel.agreement import from_rank_zero, is_rank_zero, require_agreement, run_on_rank_zero, run_together

_SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSettings:
    """What ``build_datasets`` needs, under the names of Megatron's flags.

    Attributes:
        data_path: one prefix, several, or weight and prefix in turn (``--data-path``).
        split: shares of sequences for train, valid and test, e.g. ``"969,30,1"``; None with ``data_paths``.
        seq_length: tokens of a sample, without the additional one for the last label.
        seed: of the shuffles, 0 to 2**32 - 1.
        tokenizer: the one that made the data.
        data_cache_path: directory for the shuffled indices, shared by all nodes. None puts them beside each dataset,
            in ``<prefix>/cache``.
        eod_mask_loss: no loss where the input token is end-of-document.
        data_paths: instead of ``data_path`` and ``split``: the data of train, valid and test (``--train-data-path`` and
            so on), each as ``data_path``; an empty one means no data.
    """

    data_path: tuple[str, ...]
    split: str | None
    seq_length: int
    seed: int
    tokenizer: Tokenizer
    data_cache_path: str | None = None
    eod_mask_loss: bool = False
    data_paths: tuple[tuple[str, ...], ...] | None = None

    def path_of(self, number: int) -> tuple[str, ...]:
        """The data path of split 0 (train), 1 (valid) or 2 (test)."""
        return self.data_path if self.data_paths is None else self.data_paths[number]

    def flag_of(self, number: int) -> str:
        """The flag that gives it."""
        return "--data-path" if self.data_paths is None else f"--{_SPLIT_NAMES[number]}-data-path"

    def has_split(self, number: int) -> bool:
        """Whether the flags leave that split any data."""
        if self.data_paths is not None:
            return bool(self.data_paths[number])
        assert self.split is not None
        return split_shares(self.split)[number] > 0


@dataclass(frozen=True)
class Datasets:
    """Map-style datasets; None where no samples were asked for.

    A sample is a dict with ``tokens`` int64 [S], ``labels`` int64 [S], ``loss_mask`` float32 [S].
    """

    train: PretrainingDataset | BlendedDataset | None
    valid: PretrainingDataset | BlendedDataset | None
    test: PretrainingDataset | BlendedDataset | None


@dataclass(frozen=True)
class _Inspection:
    """What all ranks must agree on before the first barrier of the builder."""

    request: str
    tokenizer: dict[str, Any]
    data_fingerprint: str
    content: tuple[str, ...]
    num_tokens: dict[str, int]


def build_datasets(settings: DataSettings, train_samples: int, valid_samples: int, test_samples: int) -> Datasets:
    """Checks the data and builds the datasets, which repeat the data as often as necessary.

    Collective: every rank calls it with the same arguments. When one rank finds a problem, all ranks raise it.
    Needs no megatron ``parallel_state``. Several prefixes without weights are blended in proportion to their tokens.

    Args:
        train_samples, valid_samples, test_samples: least length of each dataset, 0 for no dataset. The number of
            samples shapes the shuffle, so a resumed run asks for the samples of the whole run.

    Raises:
        DataError: as ``read_layout``, ``check_token_range`` and ``parse_data_path``; a split is shorter than one
            sample of ``seq_length + 1`` tokens; the cache cannot be written or is not shared; ranks disagree.
    """
    samples = (train_samples, valid_samples, test_samples)
    inspection = run_together(lambda: _inspect(settings, samples))
    require_agreement("the training data", inspection.request)
    require_agreement("the tokenizer", inspection.tokenizer)
    require_agreement("the training data", (inspection.data_fingerprint, inspection.num_tokens, inspection.content))
    if not any(samples):
        return Datasets(None, None, None)
    config = _megatron_config(settings, samples, inspection)

    def build() -> list[Any]:
        return Builder(PretrainingDataset, list(samples), lambda: True, config).build()

    first = run_on_rank_zero(build)
    return Datasets(*run_together(lambda: first or build()))


def training_sizes(train: PretrainingDataset | BlendedDataset | None) -> list[tuple[float, int]]:
    """Weight in the blend, and tokens of one epoch, of each data set."""
    if train is None:
        return []
    parts, weights = (train.datasets, train.weights) if isinstance(train, BlendedDataset) else ([train], [1.0])
    return [
        (float(weight), int(part.dataset.sequence_lengths[part.indices].sum(dtype=np.int64)))
        for weight, part in zip(weights, parts, strict=True)
    ]


def validation_entropy(valid: Any) -> float | None:
    """`unigram_entropy` of the sequences of a validation set; None for a blend, or without a set."""
    return unigram_entropy(valid.dataset, valid.indices) if isinstance(valid, PretrainingDataset) else None


def identify(data_path: Sequence[str], flag: str = "--data-path") -> dict[str, Any]:
    """Identifies the training data, so that a resumed run can compare it with its checkpoint's. Not collective.

    Returns:
        "content": of each dataset its weight in the blend and a fingerprint of its index and sampled tokens, which do
        not depend on where the files lie; "shown": the path.

    Raises:
        DataError: as ``read_layout``.
    """
    prefixes, weights = parse_data_path(data_path, flag)
    weights = weights if len(prefixes) > 1 else None
    total = sum(weights or ())
    content = []
    for number, layout in enumerate(map(read_layout, prefixes)):
        digest = hashlib.sha256((layout.fingerprint + content_digest(layout)).encode()).hexdigest()[:12]
        content.append(digest if weights is None else f"{weights[number] / total:.6g} {digest}")
    return {"content": content, "shown": " ".join(data_path)}


def identify_paths(settings: DataSettings) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`identify` of the training data, and of validation data with a path of its own. Rank 0 reads. Collective."""
    has_valid_path = settings.data_paths is not None and settings.has_split(1)

    def read() -> list[dict[str, Any]]:
        return [identify(settings.path_of(number), settings.flag_of(number)) for number in range(1 + has_valid_path)]

    found = from_rank_zero(read)
    return found[0], found[1] if has_valid_path else None


def documents_of(data: Any, samples: Sequence[int], shown: int = 4) -> list[str]:
    """Names the documents that contain samples of a data set; empty unless megatron-core made the data set."""
    found: dict[str, list[int]] = {}
    for index in samples:
        source, position = data, index
        if isinstance(data, BlendedDataset):
            data[index]  # maps its index into memory
            source, position = data.datasets[data.dataset_index[index]], int(data.dataset_sample_index[index])
        if isinstance(source, GPTDataset):
            sequences = sequences_of(source, position)
            documents = (document_of(source.dataset.document_indices, sequence) for sequence in sequences)
            found.setdefault(source.dataset_path, []).extend(documents)
    texts = []
    for path, numbers in found.items():
        unique = list(dict.fromkeys(numbers))
        rest = f", … ({len(unique)} in all)" if len(unique) > shown else ""
        texts.append(f"documents {', '.join(map(str, unique[:shown]))}{rest} of {path}")
    return texts


def _megatron_config(
    settings: DataSettings, samples: tuple[int, int, int], inspection: _Inspection
) -> FingerprintedConfig:
    def blend(number: int) -> tuple[list[str], list[float] | None]:
        prefixes, weights = parse_data_path(settings.path_of(number), settings.flag_of(number))
        if len(prefixes) == 1:
            return prefixes, None
        # megatron-core would also weigh by length, but would cap the blend at one epoch, which ends a long run.
        return prefixes, weights or [float(inspection.num_tokens[prefix]) for prefix in prefixes]

    source: dict[str, Any]
    if settings.data_paths is None:
        assert settings.split is not None
        source = {"blend": blend(0), "split": plain_split(settings.split)}
    else:
        source = {"blend_per_split": [blend(number) if count else None for number, count in enumerate(samples)]}
    config = FingerprintedConfig(
        **source,
        random_seed=settings.seed,
        sequence_length=settings.seq_length,
        path_to_cache=settings.data_cache_path,
        tokenizer=settings.tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=settings.eod_mask_loss,
        create_attention_mask=False,
        # A blend of k datasets rounds each share up, k extra samples at most, which the largest may
        # have to supply; the default of 0.5 % is too little for small or many datasets.
        mid_level_dataset_surplus=max(0.005, 2 * len(inspection.num_tokens) / min(n for n in samples if n)),
        data_fingerprint=inspection.data_fingerprint,
    )
    if config.split_matrix is not None:
        # megatron-core counts epochs of an empty split forever, even for 0 samples: leave such splits out.
        config.split_matrix = [b if n else None for b, n in zip(config.split_matrix, samples, strict=True)]
    return config


def _inspect(settings: DataSettings, samples: tuple[int, int, int]) -> _Inspection:
    """Checks everything that can be checked without building a dataset."""
    if settings.seq_length < 1 or min(samples) < 0 or not 0 <= settings.seed < 2**32:
        raise DataError(
            f"--seq-length ({settings.seq_length}) must be at least 1, --seed ({settings.seed}) in "
            f"0..2**32-1, and the samples of train, valid and test {samples} not negative."
        )
    layouts: dict[str, IndexedLayout] = {}
    for number, count in enumerate(samples):
        if settings.data_paths is not None and not count:
            continue
        for prefix in parse_data_path(settings.path_of(number), settings.flag_of(number))[0]:
            if prefix not in layouts:
                layouts[prefix] = read_layout(prefix, settings.tokenizer.eod)
            if count:
                _check_length(layouts[prefix], settings, number)
    # The same files on every rank: one reader of all tokens is enough.
    if is_rank_zero():
        for layout in layouts.values():
            check_token_range(layout, settings.tokenizer.vocab_size)
    data = f"split {settings.split}, data path {' '.join(settings.data_path)}"
    if settings.data_paths is not None:
        data = f"train, valid and test data paths {' | '.join(' '.join(path) for path in settings.data_paths)}"
    request = f"sequence length {settings.seq_length}, seed {settings.seed}, samples {samples}, {data}"
    return _Inspection(
        request,
        dict(settings.tokenizer.unique_identifiers),
        " ".join(layout.fingerprint for layout in layouts.values()),
        tuple(content_digest(layout) for layout in layouts.values()),
        {prefix: layout.num_tokens for prefix, layout in layouts.items()},
    )


def _check_length(layout: IndexedLayout, settings: DataSettings, number: int) -> None:
    """Raises a DataError when a split is shorter than one sample."""
    count, name, share = len(layout.lengths), _SPLIT_NAMES[number], ""
    sequences = range(count)
    if settings.split is not None:
        sequences = split_ranges(settings.split, count)[number]
        share = f" (--split {settings.split})"
    num_tokens = int(layout.lengths[sequences.start : sequences.stop].sum(dtype=np.int64))
    if num_tokens < settings.seq_length + 1:
        larger = ", a larger share in --split" if share else ""
        without = ", or --eval-iters 0 for a run without validation" if name == "valid" else ""
        raise DataError(
            f"{layout.prefix}: the {name} split{share} is {len(sequences)} of {count} {layout.unit} with {num_tokens} "
            f"tokens, less than one sample: --seq-length {settings.seq_length} takes {settings.seq_length + 1}. Use "
            f"more data{larger}, a shorter --seq-length{without}."
        )
