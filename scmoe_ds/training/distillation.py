"""Starts self-distillation of this package's GPT: a teacher in memory, or its logits on disk.

Called when the model holds the source's weights, before a checkpoint of the student is loaded: the teacher of a resumed
run is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from scmoe_ds.checkpoint import Candidate
from scmoe_ds.checkpoint.directories import locate
from scmoe_ds.checkpoint.files import read_manifest
from scmoe_ds.config.adapt_section import DistillConfig, section_of_base
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.teacher_logits import TeacherLogits, open_directory
from scmoe_ds.engine.distill import Distillation
from scmoe_ds.errors import CheckpointError, DataError
from scmoe_ds.models.divergence import BestTokens
from scmoe_ds.parallel.agreement import fingerprint, from_rank_zero, run_together
from scmoe_ds.parallel.output import log
from scmoe_ds.training.teacher_pass import TeacherPass

TEACHER = "the teacher"
"""Its name among the settings of a run, and in what stored logits are made of."""
_OF_ROUTING = {
    "architecture",
    "top_k",
    "merge",
    "router",
    "eval_capacity_factor",
    "min_capacity",
    "drop_tokens",
    "use_rts",
    "top2_2nd_expert_sampling",
    "gate_softmax",
}
"""Fields of the section that decide what a source says, beside its weights."""


def has_teacher(section: ScMoEConfig) -> bool:
    """Whether a run learns from a teacher."""
    distill = None if section.adapt is None else section.adapt.distill
    return distill is not None and (distill.alpha > 0 or distill.gamma > 0)


def has_teacher_in_memory(section: ScMoEConfig) -> bool:
    """Whether that teacher's logits are not on disk."""
    distill = None if section.adapt is None else section.adapt.distill
    return has_teacher(section) and distill is not None and distill.teacher_logits is None


def needs_source(section: ScMoEConfig, samples: int, micro_batch_size: int, made_of: Mapping[str, Any]) -> bool:
    """Whether the model has to hold the source's weights at the start of a run that goes on from its own checkpoint:
    the teacher is in memory, or some of its logits are not yet on disk. Collective.

    Args:
        samples: of the whole run.
        micro_batch_size, made_of: as of `distil`.

    Raises:
        DataError: `teacher_logits` of something else.
    """
    distill = None if section.adapt is None else section.adapt.distill
    if distill is None or distill.teacher_logits is None:
        return has_teacher(section)
    store = _open(section, distill, made_of, micro_batch_size)
    return bool(from_rank_zero(lambda: store.missing(samples)))


def teacher_of(section: ScMoEConfig, own: Candidate | None = None) -> dict[str, str]:
    """{"the teacher": fingerprint of its files, by their checksums}; empty without a teacher. Reads no weights.

    A run that goes on has the same teacher, wherever it lies. Collective.

    Args:
        own: the checkpoint that the run goes on from, which knows a teacher that is gone and whose logits are on disk.

    Raises:
        CheckpointError: the source has no list of its files.
    """
    source = None if section.adapt is None else section.adapt.source
    if source is None or not has_teacher(section):
        return {}
    path, flag = Path(source), "scmoe.adapt.source"
    known = None if own is None or has_teacher_in_memory(section) else (own.description.get("run") or {}).get(TEACHER)

    def find() -> str:
        try:
            return fingerprint(read_manifest(locate(path), flag))
        except CheckpointError:
            if not isinstance(known, str):
                raise
            return known

    return {TEACHER: from_rank_zero(find)}


def distil(
    engine: Any, section: ScMoEConfig, data: Any, micro_batch_size: int, made_of: Mapping[str, Any]
) -> Distillation | None:
    """Makes `engine.distill`, if the section asks for it. Collective.

    Args:
        engine: its module is a GPT with the source's weights, of which no layer was trained yet.
        data: the training samples of the whole run.
        micro_batch_size: samples of one pass.
        made_of: name → value of all that a teacher's logits depend on, beside the section: corpus, tokenizer, ….

    Raises:
        ScMoEConfigError: a teacher that cannot be, see `engine.teacher.Teacher` and `engine.streams.Streams`.
        DataError: `teacher_logits` of something else, see `data.teacher_logits`.
    """
    distill = None if section.adapt is None else section.adapt.distill
    if distill is None:
        return None
    conversion, stored = engine.module.conversion, None
    if distill.teacher_logits is not None and distill.alpha > 0:
        store = _open(section, distill, made_of, micro_batch_size)
        TeacherPass(engine, conversion, data, store, distill, micro_batch_size).run()

        def stored(samples: range, tokens: Tensor) -> BestTokens:
            return BestTokens(*(each.to(tokens.device) for each in store.read(samples, tokens)))

    engine.distill = Distillation(engine, conversion, section, stored)
    log(_text(engine.distill))
    return engine.distill


def _open(
    section: ScMoEConfig, distill: DistillConfig, made_of: Mapping[str, Any], micro_batch_size: int
) -> TeacherLogits:
    assert distill.teacher_logits is not None
    directory, flag = Path(distill.teacher_logits), "--teacher-logits"
    base = section_of_base(section)
    routing = base.model_dump(mode="json", include=_OF_ROUTING)
    own = {"temperature": distill.temperature, "teacher_top_n": distill.teacher_top_n}
    if base.drop_tokens:  # which tokens an expert accepts depends on the others of their micro-batch
        own["the micro-batch size"] = micro_batch_size
    whole = {**made_of, "the section's fingerprint": fingerprint(routing), **own}
    whole = json.loads(json.dumps(whole))  # as a manifest gives it back
    store = from_rank_zero(lambda: open_directory(directory, flag, whole, micro_batch_size))

    def check_shared() -> None:
        if not directory.is_dir():
            raise DataError(f"{flag} {directory}: is not there on all nodes; name a directory that all of them share")

    run_together(check_shared)
    return store


def _text(distillation: Distillation) -> str:
    weights = distillation.weights
    parts = {
        f"{weights.alpha:g} · KL at temperature {weights.temperature:g}": weights.alpha,
        f"{weights.beta:g} · LM": weights.beta,
        f"{weights.gamma:g} · match of the MoE blocks": weights.gamma,
    }
    loss = " + ".join(text for text, weight in parts.items() if weight)
    if distillation.teacher is not None:
        size = distillation.teacher.copied_bytes / 1e9
        return f"distillation: {loss}; the teacher shares the model, {size:.3g} GB of weights a rank are its own"
    return f"distillation: {loss}" + (
        f"; the teacher's logits are in {weights.teacher_logits}" if weights.alpha else ""
    )
