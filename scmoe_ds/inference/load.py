"""A trained GPT that is ready to run: this rank's part of the model, its tokenizer and the place of its experts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from scmoe_ds.checkpoint import tokenizer_files
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import ByteTokenizer, Tokenizer
from scmoe_ds.errors import ArgumentError, CheckpointError
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.inference.offload import Offloading, offload_experts, places_on_device
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.decisions.partition import parts_of
from scmoe_ds.offload.store import ExpertStore
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.agreement import run_together
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device


@dataclass(frozen=True)
class Loaded:
    """This rank's part of a trained model, and what goes with it.

    Attributes:
        trained: the checkpoint.
        model: in evaluation mode.
        config: under which it runs.
        layout: of the ranks.
        tokenizer: the one of the training.
        store: of offloaded experts; None: all experts are on the device.
    """

    trained: TrainedModel
    model: GPT
    config: ScMoEConfig
    layout: Layout
    tokenizer: Tokenizer
    store: ExpertStore | None


def load_trained(
    path: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: Tokenizer | None = None,
    layout: Layout | None = None,
    offloading: Offloading | None = None,
) -> Loaded:
    """Loads a trained GPT. Collective.

    Args:
        path: a checkpoint of pretrain_gpt_scmoe.py, a directory of them (its latest), or an export.
        dtype: "fp32", "bf16" or "fp16"; None: as it was trained or exported.
        tokenizer: the one of the training; None: the one that the checkpoint records, or bytes if it records none.
        layout: of all ranks; None: each rank holds the whole model.
        offloading: keeps routed experts out of the device's memory; None: they are on the device.

    Raises:
        ArgumentError, CheckpointError, DataError, ScMoEConfigError: what a user can correct.
    """
    layout = layout or Layout(dist.get_world_size())
    # Experts that stay in their files are not read before they are needed.
    trained = TrainedModel.open(path, contents=offloading is None)
    if dist.get_rank() == 0:
        print(f"loading {trained.path}", file=sys.stderr)
    config = serving_config(trained.config, layout.expert_size, layout.divided_experts)
    config.check_world(layout.ranks, layout.tensor_size)
    found = run_together(lambda: trained_tokenizer(path, trained, tokenizer))
    tensor.start_tensor_parallel(layout.tensor_size)
    try:
        model, store = _load_model(trained, config, DTYPES[dtype or trained.dtype], offloading)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return Loaded(trained, model, config, layout, found, store)


def trained_tokenizer(path: str | Path, trained: TrainedModel, named: Tokenizer | None) -> Tokenizer:
    """The tokenizer that the checkpoint records; one that the caller names must be the same. Raises an ArgumentError, a
    CheckpointError or a DataError if it does not fit."""
    record = trained.tokenizer
    if named is not None and record is not None:
        described = tokenizer_files.describe(named)
        tokenizer_files.check_same(trained.path, record, described, "--load", "the tokenizer of the flags")
    elif named is None and record is not None:
        named = tokenizer_files.recorded_tokenizer(trained.path, record, "--load")
    elif named is None:
        if dist.get_rank() == 0:
            print(
                f"--load {path} does not record its tokenizer: ByteTokenizer is used; name another with "
                "--tokenizer-type and its files",
                file=sys.stderr,
            )
        named = ByteTokenizer()
    size = trained.settings.vocab_size
    if named.vocab_size > size:
        raise ArgumentError(
            f"--tokenizer-type {named.name} has {named.vocab_size} tokens, the model of --load {path} {size}: name the "
            "tokenizer that it was trained with"
        )
    return named


def _load_model(
    trained: TrainedModel, config: ScMoEConfig, dtype: torch.dtype, offloading: Offloading | None
) -> tuple[GPT, ExpertStore | None]:
    if offloading is None:
        return load_model(trained, config, dtype, device()), None
    stores: list[ExpertStore] = []

    def offload(model: GPT) -> None:
        layers = [pair.layer for pair in model.scheduled_pairs()]
        most = max(layer.top_k * parts_of(layer) for layer in layers)
        places = places_on_device(offloading.cache, model, 2 * most, trained, dtype, device())
        stores.append(offload_experts(model, trained, offloading.mode, places, dtype, device(), offloading.tier))

    model = load_model(trained, config, dtype, device(), offload)
    return model, stores[0]
