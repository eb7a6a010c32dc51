"""Training that starts from another model's weights: `scmoe.adapt.source` (scmoe pretrain --adapt-from)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from scmoe_ds.checkpoint import Candidate, candidate, reshard, tokenizer_files
from scmoe_ds.checkpoint.source_model import SourceModel, with_base_of
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.sampler import pretraining_batches
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.agreement import run_together
from scmoe_ds.parallel.output import log
from scmoe_ds.parallel.process import device
from scmoe_ds.parallel.tensor import data_parallel_rank, data_parallel_size
from scmoe_ds.training.distillation import has_teacher_in_memory
from scmoe_ds.training.expert_counts import busiest_experts
from scmoe_ds.training.expert_fit import fit_shared_experts

_MICRO_BATCHES = 16
"""Of each rank, on which the busiest experts are counted, or new ones fitted."""


def own_checkpoint(args: argparse.Namespace, section: ScMoEConfig) -> Candidate | None:
    """What a run with `adapt.source` goes on from, by its --load, --save and --auto-resume. Collective."""
    if section.adapt is None or section.adapt.source is None:
        return None
    return candidate(args.load, args.save, args.auto_resume)


def with_base(
    loaded: LoadedConfig,
    settings: GPTSettings,
    tokenizer: Mapping[str, Any] | None,
    own: Candidate | None = None,
) -> LoadedConfig:
    """The JSON whose section says how the layers of its `adapt.source` ran, and has the source's values of fields that
    it leaves out and that decide on the weights.

    A run that goes on finds them in its checkpoint. Without a teacher in memory it does not need the source, which may
    be gone by then.

    Args:
        settings: the shape of the model that is to be trained.
        tokenizer: `tokenizer_files.describe` of this run's; None: it is not known.
        own: the checkpoint that the run goes on from.

    Raises:
        CheckpointError, ScMoEConfigError: no such source, or one that cannot become this model.
    """
    section = loaded.section
    if section.adapt is None or section.adapt.source is None:
        return loaded
    saved = None if own is None or own.config.adapt is None else own.config.adapt.base
    if own is not None and saved is not None and not has_teacher_in_memory(section):
        config = with_base_of(section, own.config, saved, own.path)
        config.check_model(settings.num_layers)
        return _with_section(loaded, config)
    source = SourceModel.open(Path(section.adapt.source), contents=False)
    record = source.description.get(tokenizer_files.KEY)
    if record is not None and tokenizer is not None:
        flag = "scmoe.adapt.source"
        tokenizer_files.check_same(source.weights.path, record, tokenizer, flag, "this run's tokenizer")
    config = source.with_base(section)
    source.check(settings, config)
    return _with_section(loaded, config)


def _with_section(loaded: LoadedConfig, config: ScMoEConfig) -> LoadedConfig:
    return LoadedConfig({**loaded.whole, "scmoe": config.model_dump(mode="json", exclude_unset=True)}, config)


def first_batches(data: Any, micro_batch_size: int) -> Iterator[Tensor]:
    """Tokens [B, S] of this rank's first micro-batches of a training set, on its device."""
    loader = pretraining_batches(
        data,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank(),
        data_parallel_size=data_parallel_size(),
        consumed_samples=0,
    )
    for batch in islice(loader, _MICRO_BATCHES):
        yield batch["tokens"].to(device())


def put_source(engine: Any, section: ScMoEConfig, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Gives an engine the weights of its `adapt.source`, before its first step. Collective.

    Args:
        engine: of a GPT with that section.
        batches: this rank's tokens [B, S], on which the busiest experts are counted, or new ones fitted.

    Raises:
        CheckpointError: the source is damaged.
        ScMoEConfigError: shared experts that cannot be fitted.
    """
    adapt = section.adapt
    assert adapt is not None and adapt.source is not None
    path, text = Path(adapt.source), ""
    source, fits = SourceModel.open(path), adapt.shared_expert == "fit"
    run_together(lambda: reshard.put_weights(engine, source.surgery(section, fitted={} if fits else None)))
    if adapt.shared_expert == "busiest":
        busiest = busiest_experts(engine.module, batches())
        run_together(lambda: reshard.put_weights(engine, source.surgery(section, busiest)))
        text = f"; shared experts are the experts {', '.join(map(str, busiest))}, the busiest of MoE layer 0, 1, …"
    if fits:
        fitted = fit_shared_experts(engine.module, list(batches()))
        run_together(lambda: reshard.put_weights(engine, source.surgery(section, fitted=fitted)))
        text = "; shared experts are fitted to what the routed ones leave"
    log(f"scmoe.adapt.source {source.weights.path}: weights of the model that is adapted{text}")


def convert_as_saved(model: GPT, iteration: int) -> None:
    """Converts the layers of a model with `adapt.convert_every` that ran converted in the last step before its
    checkpoint. The next training step may convert one more; a validation before that must not find fewer.

    Args:
        iteration: of the checkpoint; 0: there is none.
    """
    adapt = model.config.adapt
    if adapt is not None and adapt.convert_every and iteration and model.conversion.numbers:
        model.conversion.only(adapt.converted_at(iteration, len(model.runs)))


def validate_first(trainer: Any) -> None:
    """Validates what a training from `adapt.source` starts from, for its record: the source, and the ScMoE with all of
    its layers converted. Collective; before the first step, when no weight has changed.

    Args:
        trainer: a training.loop.Trainer of a GPT.
    """
    conversion, data = trainer.engine.module.conversion, trainer.valid_set
    if data is None or not conversion.numbers:
        return
    before = conversion.converted
    try:
        conversion.only(())
        teachers = trainer.evaluate(data)
        conversion.only(conversion.numbers)
        own = trainer.evaluate(data)
    finally:
        conversion.only(before)
    if own is not None:
        trainer.log.write_validation(0, 0, own, teachers)
