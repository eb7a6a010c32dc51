"""Training that starts from another model's weights: `scmoe.adapt.source` (scmoe pretrain --adapt-from)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from scmoe_ds.checkpoint import reshard, tokenizer_files
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.loading import LoadedConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.agreement import require_agreement, run_together
from scmoe_ds.parallel.output import log
from scmoe_ds.training.expert_counts import busiest_experts

_MICRO_BATCHES = 16
"""Of each rank, on which the busiest experts are counted."""


def with_base(loaded: LoadedConfig, settings: GPTSettings, tokenizer: Mapping[str, Any]) -> LoadedConfig:
    """The JSON whose section says how the layers of its `adapt.source` ran. Collective.

    Args:
        settings: the shape of the model that is to be trained.
        tokenizer: `tokenizer_files.describe` of this run's.

    Raises:
        CheckpointError, ScMoEConfigError: on every rank: no such source, or one that cannot become this model.
    """
    section = loaded.section
    if section.adapt is None or section.adapt.source is None:
        return loaded
    path = Path(section.adapt.source)

    def filled() -> ScMoEConfig:
        source = SourceModel.open(path, contents=False)
        record = source.description.get(tokenizer_files.KEY)
        if record is not None:
            flag = "scmoe.adapt.source"
            tokenizer_files.check_same(source.weights.path, record, tokenizer, flag, "this run's tokenizer")
        config = source.with_base(section)
        source.check(settings, config)
        return config

    config = run_together(filled)
    require_agreement("the base of scmoe.adapt.source", str(config.adapt))
    return dataclasses.replace(loaded, section=config)


def put_source(engine: Any, section: ScMoEConfig, batches: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
    """Gives an engine the weights of its `adapt.source`, before its first step. Collective.

    Args:
        engine: of a GPT with that section.
        batches: this rank's first micro-batches of the training data; the busiest experts are counted on them.

    Raises:
        CheckpointError: the source is damaged.
    """
    adapt = section.adapt
    assert adapt is not None and adapt.source is not None
    path, text = Path(adapt.source), ""
    source = run_together(lambda: SourceModel.open(path))
    run_together(lambda: reshard.put_weights(engine, source.surgery(section)))
    if adapt.shared_expert == "busiest" and not source.has_shared_expert:
        device = next(engine.module.parameters()).device
        tokens = (batch["tokens"].to(device) for batch in islice(batches(), _MICRO_BATCHES))
        busiest = busiest_experts(engine.module, tokens)
        run_together(lambda: reshard.put_weights(engine, source.surgery(section, busiest)))
        text = f"; shared experts are the experts {', '.join(map(str, busiest))}, the busiest of MoE layer 0, 1, …"
    log(f"scmoe.adapt.source {source.weights.path}: weights of the model that is adapted{text}")
