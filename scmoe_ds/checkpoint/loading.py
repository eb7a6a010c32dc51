"""Loading: which checkpoint a run starts from, and by which way it gets into the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scmoe_ds.checkpoint import description as fields
from scmoe_ds.checkpoint import files, reshard, tensor_files, tokenizer_files
from scmoe_ds.checkpoint.files import CheckpointError, DamagedCheckpointError
from scmoe_ds.checkpoint.safetensors_files import CONFIG_FILE, SafetensorsWeights, is_export
from scmoe_ds.checkpoint.saved_state import SavedState
from scmoe_ds.parallel.agreement import require_agreement, run_together

logger = logging.getLogger("scmoe_ds")


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been found good.

    Attributes:
        path: its directory.
        flag: by which it was found, for messages.
        description: its own.
        changed: fields of the layout that differ in this run: (then, now).
        weights_only: an export in safetensors: a start with these weights, not a resume.
    """

    path: Path
    flag: str
    description: Mapping[str, Any]
    changed: Mapping[str, tuple[Any, Any]]
    weights_only: bool = False


def choose(load: str | None, save: str | None, auto_resume: bool, description: Mapping[str, Any]) -> Source | None:
    """What a run starts from; None: from scratch. Collective; a run can ask before it builds its engine.

    With `auto_resume` the newest good checkpoint of `save`, and only if there is none what `load` names: the latest
    checkpoint of a directory, a checkpoint itself, or an export in safetensors.

    Raises:
        CheckpointError: on every rank: another model, or (with `load`) a damaged checkpoint.
    """
    found = None
    if auto_resume and save:
        found = _newest_good(Path(save), description)
    if found is None and load:
        found = _named(Path(load), description)
    require_agreement("the checkpoint to start from", None if found is None else str(found.path))
    return found


def load(engine: Any, source: Source | None) -> tuple[int, int]:
    """Restores weights, optimizer, learning-rate schedule and measured times; of an export the weights alone.

    The layout of the checkpoint goes through DeepSpeed's loader, any other through the whole parameters.

    Returns:
        (iteration, consumed samples); (0, 0) from scratch and after an export.

    Raises:
        CheckpointError: what is there does not fit this engine.
    """
    if source is None:
        return 0, 0
    if source.weights_only:
        run_together(lambda: reshard.put_weights(engine, SafetensorsWeights(source.path)))
        _log(f"{source.flag} {source.path}: weights of an export; optimizer and iteration start anew")
        return 0, 0
    if source.changed or not _deepspeed_can_read(source.description["layout"]):
        state = run_together(lambda: _reshard(engine, source))
    else:
        state = run_together(lambda: _load_with_deepspeed(engine, source))  # it does not communicate either
    assert state is not None
    # Times of another layout are of no use; they are measured again.
    engine.overlap.resume(state.get("overlap") if set(source.changed) <= {fields.ZERO_STAGE} else None)
    return int(state["iteration"]), int(state["consumed_samples"])


def _reshard(engine: Any, source: Source) -> dict[str, Any]:
    if source.changed:
        _log(f"{source.flag} {source.path}: resharding {fields.layout_text(source.changed)}")
    saved = SavedState(source.path, source.description)
    reshard.put_state(engine, saved)
    then, now = source.description.get(fields.BATCH), engine.train_batch_size()
    if then != now:
        _log(f"{source.flag} {source.path}: a step now takes {now} sequences, before {then}; set "
             "gradient_accumulation_steps to keep it", logging.WARNING)  # fmt: skip
    return saved.header


def _deepspeed_can_read(layout: Mapping[str, Any]) -> bool:
    """DeepSpeed's loader looks for its experts under a rank's own tensor-parallel rank, but copies of them on several
    tensor-parallel ranks are written by one."""
    return layout[fields.EXPERT_TENSOR_PARALLEL] or layout[fields.EXPERT_PARALLEL] % layout[fields.TENSOR_PARALLEL] == 0


def _load_with_deepspeed(engine: Any, source: Source) -> dict[str, Any]:
    tensor_ranks = source.description["layout"][fields.TENSOR_PARALLEL]
    with (
        tensor_files.as_expected(source.path, source.flag),
        tensor_files.fed_by_us(engine, source.path, tensor_ranks, source.flag),
    ):
        return engine.load_checkpoint(str(source.path.parent), tag=source.path.name)[1]


def _newest_good(root: Path, description: Mapping[str, Any]) -> Source | None:
    """`latest` is a hint only: a save may have ended between the two renames that publish it."""
    holder = [run_together(lambda: files.newest_first(root), on_rank_zero=True)]
    if dist.is_initialized():
        dist.broadcast_object_list(holder)
    for tag in holder[0] or ():
        try:
            return _check(root / tag, "--auto-resume", description)
        except DamagedCheckpointError as error:  # on every rank
            _log(f"passed over: {error}", logging.WARNING)
    _log(f"--auto-resume: {root} has no whole checkpoint")
    return None


def _named(path: Path, description: Mapping[str, Any]) -> Source | None:
    directory = run_together(lambda: _resolve(path))
    require_agreement("the latest checkpoint", directory)
    return None if directory is None else _check(Path(directory), "--load", description)


def _resolve(path: Path) -> str | None:
    """The directory of tensors that a path stands for; None if it has no checkpoint yet."""
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"--load {path}: is a file, not a directory of checkpoints")
    if is_export(path) or (path / files.DESCRIPTION_FILE).is_file():
        return str(path)
    tag = files.read_latest(path)
    if tag is None:
        return None
    if not (path / tag).is_dir():
        raise CheckpointError(f"--load {path}: latest names {tag}, but there is no such directory; "
                              f"name one of {', '.join(files.newest_first(path)) or 'another --load'}")  # fmt: skip
    return str(path / tag)


def _check(path: Path, flag: str, description: Mapping[str, Any]) -> Source:
    """Collective.

    Raises:
        DamagedCheckpointError: not all there, or not as written.
        CheckpointError: another model.
    """
    export = is_export(path)

    def describe() -> dict[str, Any]:
        saved = files.read_description(path, CONFIG_FILE if export else files.DESCRIPTION_FILE, flag)
        fields.check_model(saved, description, f"{flag} {path}")
        _check_tokenizer(path, flag, saved.get(tokenizer_files.KEY), description.get(tokenizer_files.KEY), export)
        return saved

    saved = run_together(describe)
    assert saved is not None
    changed = {} if export else fields.changed_layout(saved, description)
    if changed:
        fields.check_layout_is_free(saved["layout"], f"{flag} {path} (the checkpoint)")
        fields.check_layout_is_free(description["layout"], f"{flag} {path} (this run)")
    files.verify(path, flag)
    if not export:
        tensor_files.check(path, flag)
    return Source(path, flag, saved, changed, weights_only=export)


def _check_tokenizer(path: Path, flag: str, saved: Any, wanted: Any, export: bool) -> None:
    """A run goes on with its tokenizer. One that starts from an export's weights may have another: it is told.

    Raises:
        CheckpointError: another tokenizer.
    """
    if saved is None or wanted is None:
        return
    try:
        tokenizer_files.check_same(path, saved, wanted, flag, "this run's tokenizer")
    except DamagedCheckpointError:
        raise
    except CheckpointError as error:
        if not export:
            raise
        _log(str(error), logging.WARNING)


def _log(line: str, level: int = logging.INFO) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.log(level, line)
