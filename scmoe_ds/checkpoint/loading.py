"""Chooses the checkpoint that a run starts from, and loads it into the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import failure_notes, files, parsing, reshard, tensor_files, tokenizer_files
from scmoe_ds.checkpoint.comparison import Difference, Outcome, check_refused, differences, select
from scmoe_ds.checkpoint.directories import check_save, locate
from scmoe_ds.checkpoint.files import DamagedCheckpointError
from scmoe_ds.checkpoint.hyperparameters import OwnSettings
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, SafetensorsWeights, is_export
from scmoe_ds.checkpoint.saved_state import SavedState
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.agreement import from_rank_zero, is_rank_zero, require_agreement, run_on_rank_zero, run_together

logger = logging.getLogger("scmoe_ds")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has passed all checks.

    Attributes:
        path: its directory.
        flag: the flag that led to it, for messages.
        description: its own.
        changed: fields of the layout that differ in this run: (then, now).
        weights_only: an export in safetensors, from which a run starts but which it does not resume.
        differences: other settings that differ in this run.
    """

    path: Path
    flag: str
    description: Mapping[str, Any]
    changed: Mapping[str, tuple[Any, Any]]
    weights_only: bool = False
    differences: Sequence[Difference] = ()

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"

    def differs_in(self, *names: str) -> bool:
        """Whether a setting differs whose name starts with one of these."""
        return any(each.name.startswith(names) for each in self.differences)


@dataclass(frozen=True)
class Candidate:
    """The checkpoint that `choose` will take if its files are whole.

    Attributes:
        path: its directory.
        description, config: its own; the section is checked.
    """

    path: Path
    description: Mapping[str, Any]
    config: ScMoEConfig


def candidate(load: str | None, save: str | None, auto_resume: bool) -> Candidate | None:
    """What `choose` will take, before this run's model is known; None: nothing that can be read. Collective."""

    def find() -> Candidate | None:
        root, paths = Path(save or ""), list[Path]()
        if auto_resume and save:
            paths = [root / tag for tag in files.newest_first(root) if failure_notes.read(root / tag) is None]
        if not paths and load:
            with suppress(CheckpointError):  # which `choose` raises
                paths = [locate(Path(load))]
        for path in paths:
            with suppress(CheckpointError):
                name = CONFIG_FILE if is_export(path) else files.DESCRIPTION_FILE
                saved = files.read_description(path, name, "reading")
                return Candidate(path, saved, parsing.parse(saved, path).config)
        return None

    return from_rank_zero(find)


def choose(load: str | None, save: str | None, auto_resume: bool, description: Mapping[str, Any]) -> Source | None:
    """The checkpoint that a run starts from; None means from scratch. Collective; needs no engine.

    With `auto_resume` it is the newest good checkpoint of `save`. When there is none, it is what `load` names: the
    latest checkpoint of a directory, a checkpoint, or an export in safetensors.

    Raises:
        CheckpointError: on every rank: the checkpoint is of another model or has settings that cannot be taken over;
            `load` names nothing; no checkpoint that is there can be used; `save` has checkpoints of another run.
    """
    found = None
    if auto_resume and save:
        found = _newest_good(Path(save), description)
    if found is None and load:
        found = _named(Path(load), description)
    require_agreement("the checkpoint to start from", None if found is None else str(found.path))
    if save:
        start = None if found is None else found.path
        run_on_rank_zero(lambda: check_save(Path(save), start, auto_resume))
    if found is None and auto_resume:
        _log(f"{save} has no checkpoint to go on from: this run starts from scratch")
    return found


def samples_of_run(source: Source | None, train_iters: int, samples_per_iteration: int) -> int:
    """The samples of a whole run, before its checkpoint (perhaps with another batch size) and after it."""
    whole = train_iters * samples_per_iteration
    if source is None or source.weights_only:
        return whole
    saved = source.description
    with tensor_files.as_expected(source.path, source.flag):
        iteration = int(saved.get(fields.ITERATION, files.iteration_of(source.path.name) or 0))
        read = int(saved.get(fields.CONSUMED, iteration * (saved.get(fields.BATCH) or 0)))
    return max(whole, read + (train_iters - iteration) * samples_per_iteration)


def load(engine: Any, source: Source | None) -> tuple[int, int]:
    """Restores weights, optimizer, learning-rate schedule and measured times; from an export the weights alone.

    When the layout is the same, DeepSpeed's loader reads the checkpoint. Otherwise `reshard` does. Settings that differ
    are this run's, as `comparison.TABLE` says, and are logged.

    Returns:
        (iteration, consumed samples); (0, 0) from scratch and after an export.

    Raises:
        CheckpointError: the checkpoint does not fit this engine.
    """
    if source is None:
        return 0, 0
    if source.weights_only:
        run_together(lambda: reshard.put_weights(engine, SafetensorsWeights(source.path)))
        _log(f"{source}: weights of an export; optimizer and iteration start anew")
        return 0, 0
    own = OwnSettings(engine)
    own_schedule = source.differs_in("optimizer", "scheduler")
    if source.changed or not _deepspeed_can_read(source.description["layout"]):
        state = run_together(lambda: _reshard(engine, source, not own_schedule))
    else:
        state = run_together(lambda: _load_with_deepspeed(engine, source, not own_schedule))
    with tensor_files.as_expected(source.path, source.flag):
        own.fit_implementation()
        own.put_back_clipping()
        if source.differs_in("fp16"):
            own.put_back_loss_scale()
        saved_rate = own.learning_rate
        if own_schedule:
            own.put_back_optimizer(state["lr_scheduler"])
    # Times of another layout are useless, so they are measured again.
    engine.overlap.resume(state.get("overlap") if set(source.changed) <= {fields.ZERO_STAGE} else None)
    _say_what_was_loaded(source, state, saved_rate, own.learning_rate)
    return int(state["iteration"]), int(state["consumed_samples"])


def _say_what_was_loaded(source: Source, state: Mapping[str, Any], then: float | None, now: float | None) -> None:
    _log(f"{source}: loaded, iteration {state['iteration']}, {state['consumed_samples']} samples read")
    if "run" not in source.description:
        _log(
            f"{source}: written by an earlier version, which did not record optimizer, data and seed; the optimizer's "
            "settings are the checkpoint's"
        )
    if taken_over := select(source.differences, Outcome.TAKEN_OVER):
        _log(f"{source}: of this run, not of the checkpoint: {taken_over}")
    if changes := select(source.differences, Outcome.CHANGES_THE_RUN):
        _log(f"{source}: this run differs from the one that saved it: {changes}", logging.WARNING)
    if then != now:
        _log(f"{source}: learning rate of the next step: {now:.6g}; by the checkpoint's settings {then:.6g}")


def _reshard(engine: Any, source: Source, schedule: bool) -> dict[str, Any]:
    if source.changed:
        _log(f"{source}: resharding {fields.layout_text(source.changed)}")
    saved = SavedState(source.path, source.description)
    reshard.put_state(engine, saved, schedule)
    return saved.header


def _deepspeed_can_read(layout: Mapping[str, Any]) -> bool:
    """DeepSpeed looks for experts under the rank's own tensor-parallel rank. But only one of several tensor-parallel
    ranks that hold the same experts writes them."""
    if layout.get(fields.OFFLOADED):  # all experts at once would not fit
        return False
    return layout[fields.EXPERT_TENSOR_PARALLEL] or layout[fields.EXPERT_PARALLEL] % layout[fields.TENSOR_PARALLEL] == 0


def _load_with_deepspeed(engine: Any, source: Source, schedule: bool) -> dict[str, Any]:
    tensor_ranks = source.description["layout"][fields.TENSOR_PARALLEL]
    with (
        tensor_files.as_expected(source.path, source.flag),
        tensor_files.fed_by_us(engine, source.path, tensor_ranks, source.flag),
    ):
        root, tag = str(source.path.parent), source.path.name
        _, state = engine.load_checkpoint(root, tag=tag, load_lr_scheduler_states=schedule)
        return state


def _newest_good(root: Path, description: Mapping[str, Any]) -> Source | None:
    """Does not use `latest`: a save may have ended between the two renames that publish a checkpoint. Raises a
    CheckpointError if there are checkpoints, but none is whole."""

    def notes() -> list[tuple[str, str | None]]:
        return [(tag, failure_notes.read(root / tag)) for tag in files.newest_first(root)]

    damaged = []
    # All ranks use rank 0's list: ranks that saw other files would wait for each other.
    for tag, failure in from_rank_zero(notes):
        if failure is not None:
            _log(
                f"passed over: --auto-resume {root / tag}: a run that went on from it ended at once ({failure}). An "
                f"earlier one is looked for; --load {root / tag} uses it all the same",
                logging.WARNING,
            )
            continue
        try:
            return _check(root / tag, "--auto-resume", description)
        except DamagedCheckpointError as error:  # on every rank
            _log(f"passed over: {error}", logging.WARNING)
            damaged.append(tag)
    if damaged:
        raise CheckpointError(
            f"--auto-resume: {root} has checkpoints, but none can be used ({', '.join(damaged)}); "
            "move them elsewhere to start without them, or name another --save"
        )
    return None


def _named(path: Path, description: Mapping[str, Any]) -> Source:
    remedy = "correct the path, or leave --load out to start from scratch (--save DIR --auto-resume starts and resumes)"
    directory = run_together(lambda: str(locate(path, "--load ", remedy)))
    require_agreement("the latest checkpoint", directory)
    found = _check(Path(directory), "--load", description)
    if (failure := failure_notes.read(found.path)) is not None:
        _log(f"{found}: a run that went on from it ended at once ({failure})", logging.WARNING)
    return found


def _check(path: Path, flag: str, description: Mapping[str, Any]) -> Source:
    """Collective.

    Raises:
        DamagedCheckpointError: the checkpoint is incomplete, or is not as it was written.
        CheckpointError: it is of another model.
    """
    export = is_export(path)

    def different(saved: Mapping[str, Any]) -> list[Difference]:
        with tensor_files.as_expected(path, flag):  # a record can be damaged, or made up
            return [] if export else differences(saved, description)

    def describe() -> dict[str, Any]:
        saved = files.read_description(path, CONFIG_FILE if export else files.DESCRIPTION_FILE, flag)
        # Before the model: another tokenizer makes another vocabulary, which no flag sets.
        _check_tokenizer(path, flag, saved.get(tokenizer_files.KEY), description.get(tokenizer_files.KEY), export)
        fields.check_model(saved, description, f"{flag} {path}")
        parsing.parse(saved, path)
        if not export and saved.get("layout") is None:
            raise files.damaged(path, f"{files.DESCRIPTION_FILE} has no layout", flag)
        check_refused(different(saved), flag, path)
        return saved

    saved = run_together(describe)
    changed = {} if export else fields.changed_layout(saved, description)
    if changed:
        fields.check_layout_is_free(saved["layout"], f"{flag} {path} (the checkpoint)")
        fields.check_layout_is_free(description["layout"], f"{flag} {path} (this run)")
    files.verify(path, flag)
    if not export:
        tensor_files.check(path, flag)
    return Source(path, flag, saved, changed, export, different(saved))


def _check_tokenizer(path: Path, flag: str, saved: Any, current: Any, export: bool) -> None:
    """A resumed run must keep its tokenizer. A run that starts from an export may change it; a warning names both.
    Raises a CheckpointError if the tokenizers differ."""
    if saved is None or current is None:
        return
    try:
        tokenizer_files.check_same(path, saved, current, flag, "this run's tokenizer")
    except DamagedCheckpointError:
        raise
    except CheckpointError as error:
        if not export:
            raise
        _log(str(error), logging.WARNING)


def _log(line: str, level: int = logging.INFO) -> None:
    if is_rank_zero():
        logger.log(level, line)
