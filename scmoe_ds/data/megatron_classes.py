"""megatron-core's classes for GPT data, with checked files and indices and without barriers."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from scmoe_ds.data.index_cache import IndexCache
from scmoe_ds.data.sequences import Sequences
from scmoe_ds.errors import DataError
from scmoe_ds.parallel.agreement import is_rank_zero

# It warns that indices stay in memory, as they are meant to here.
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)

_INDEX_NAMES = ("document_index", "sample_index", "shuffle_index")


@dataclass
class FingerprintedConfig(GPTDatasetConfig):
    data_fingerprint: str = ""


class PretrainingDataset(GPTDataset):
    """GPTDataset with shuffled indices that are checked and that depend on the data's index.

    megatron-core names the cache after the path alone and trusts it. When a dataset is rewritten in place, or the cache
    is damaged, it would read wrong or missing documents.
    """

    dataset: Sequences
    config: FingerprintedConfig

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> Sequences:
        """megatron-core's name for opening the files."""
        return Sequences(dataset_path)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "data_fingerprint"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        kind = type(self).__name__
        directory = self.config.path_to_cache or os.path.join(self.dataset_path, "cache", f"{kind}_indices")
        name = f"{self.unique_description_hash}-{kind}-{self.index_split.name}"
        cache = IndexCache(directory, name, _INDEX_NAMES, self.unique_description)
        if is_rank_zero():
            return cache.load_or_build(self._indices_in_memory)
        found = cache.load()
        if found is None:
            raise DataError(
                f"rank {dist.get_rank()} cannot see the index cache that rank 0 wrote: {name} in {directory}. Set "
                "--data-cache-path to a directory that all nodes share."
            )
        return found

    def _indices_in_memory(self) -> tuple[np.ndarray, ...]:
        config = self.config
        try:
            self.config = copy.copy(config)
            self.config.path_to_cache = ""  # None would be the default place
            return super()._build_document_sample_shuffle_indices()
        finally:
            self.config = config


class Builder(BlendedMegatronDatasetBuilder):
    """Has none of megatron-core's barriers, at which ranks would wait for a rank that has failed."""

    @staticmethod
    def build_generic_dataset(
        cls: Any,  # the name that megatron-core gives this parameter of its static method
        is_built_on_rank: Callable[[], bool],
        synchronize_ranks: bool,
        *args: Any,
    ) -> Any:
        if cls is BlendedDataset:  # its own index is quick to make: no cache
            config = copy.copy(args[-1])
            config.path_to_cache = None
            args = (*args[:-1], config)
        return cls(*args)

    def _build_megatron_datasets_parallel(self, prefixes: Any, split: Any, sizes_per_dataset: Any) -> list[list[Any]]:
        built = [
            self._build_megatron_dataset_splits(prefix, split, sizes, False)
            for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True)
        ]
        return [list(members) for members in zip(*built, strict=True)]
