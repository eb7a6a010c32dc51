"""Saves DeepSpeed's own MoE files, waits until they are on the disk, and then publishes them as a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scmoe_ds.checkpoint import files, finite, lock, offloaded, rotation
from scmoe_ds.checkpoint.description import BATCH, CONSUMED, ITERATION
from scmoe_ds.compat import writes_by
from scmoe_ds.data.durable_files import FileEntry, file_entry, flush, try_to_write
from scmoe_ds.errors import CheckpointError, first_line
from scmoe_ds.moe.placement import with_expert
from scmoe_ds.offload.own_checkpoints import save_of
from scmoe_ds.parallel.agreement import gather, run_on_rank_zero, run_together
from scmoe_ds.parallel.tensor import tensor_parallel_rule

_PROBE_BYTES = 1 << 22


def claim(directory: str | os.PathLike[str]) -> None:
    """Makes the directory, takes its lock and tries to write in it, on rank 0. Collective.

    Call it before `choose`: a job that is just ending may still write the newest checkpoint.

    Raises:
        CheckpointError: on every rank: another job saves there, or nothing can be written.
    """

    def probe() -> None:
        try:
            os.fsencode(directory).decode()
            lock.hold(Path(directory))
            try_to_write(directory)
        except OSError as error:
            file = "" if error.filename in (None, str(directory)) else f"{Path(error.filename).name}: "
            raise CheckpointError(
                f"--save {directory}: cannot write there ({file}{error.strerror}); "
                "choose another directory or correct its permissions"
            ) from None
        except UnicodeDecodeError:
            raise CheckpointError(f"--save {str(directory)!a}: is not UTF-8; choose another name") from None

    run_on_rank_zero(probe)


def save(
    engine: Any,
    directory: str,
    iteration: int,
    consumed_samples: int,
    description: Mapping[str, Any],
    keep_last: int | None = None,
    carried: Mapping[str, bytes] | None = None,
    validated: int | None = None,
) -> Path:
    """Writes `<directory>/global_step<iteration>`. Collective.

    The directory gets its name, and "latest" names it, when all ranks' files are on the disk and the manifest has their
    sizes and checksums. When a save is interrupted, the previous checkpoint stays in use.

    Args:
        engine: DeepSpeed's, with `overlap`.
        description: of `describe`.
        keep_last: number of checkpoints to keep; None keeps all.
        carried: names and contents of small files that rank 0 adds.
        validated: the last iteration at which a validation had a finite loss. The newest checkpoint up to it is never
            removed.

    Returns:
        the checkpoint's directory.

    Raises:
        NotFiniteError: on every rank: a weight or an optimizer state is not finite; nothing is written.
        CheckpointError: on every rank: a rank could not write.
    """
    final = Path(directory) / f"global_step{iteration}"
    part = final.with_name(final.name + files.PART)

    labels = {**description, ITERATION: iteration, CONSUMED: consumed_samples}
    state = {"iteration": iteration, "consumed_samples": consumed_samples, "overlap": engine.overlap.state()}
    finite.check(engine, f"--save {directory}: {final.name}")
    with _one_sentence(part):
        run_on_rank_zero(lambda: _begin(engine, part, labels, validated, carried or {}))
        written = _write(engine, part, state)
        if dist.get_rank() == 0:
            written += [part / name for name in (files.DESCRIPTION_FILE, *(carried or {}))]
        manifest = _check_in(part, written)
        run_on_rank_zero(lambda: rotation.publish(part, final, manifest))
    if keep_last is not None:
        run_on_rank_zero(lambda: rotation.remove_old(final.parent, keep_last))
    return final


def _begin(
    engine: Any, part: Path, labels: Mapping[str, Any], validated: int | None, carried: Mapping[str, bytes]
) -> None:
    """Makes the directory, with the files that are not DeepSpeed's."""
    lock.require(part.parent)
    rotation.remove_unfinished(part.parent)
    part.mkdir(parents=True, exist_ok=True)
    whole = {
        **labels,
        BATCH: getattr(engine, "train_batch_size", lambda: None)(),
        "splits": _splits(engine),
        rotation.VALIDATED: rotation.last_validated(part.parent, labels[ITERATION], validated),
    }
    (part / files.DESCRIPTION_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for name, content in carried.items():
        (part / name).write_bytes(content)


@contextmanager
def _one_sentence(part: Path) -> Iterator[None]:
    """Turns an operating system's error that all ranks raise into a sentence for the user. Removes the partial
    checkpoint, which would keep a full disk full."""
    try:
        yield
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"--save {part.parent}: the checkpoint {part.stem} was not written: {error}. The checkpoint before it is "
            f"whole: make room there, or go on elsewhere with --load {part.parent} --save ANOTHER"
        ) from error


def _write(engine: Any, part: Path, state: dict[str, Any]) -> list[Path]:
    """Calls DeepSpeed's save and returns the files that this rank wrote.

    Raises:
        OSError: on every rank: a rank could not write a file.
        CheckpointError: on this rank alone: the operating system refused something else.
    """
    with _collected_failures(engine) as (written, failures):
        try:
            with offloaded.left_out_of_state_dicts(engine.module):
                save_of(engine)(str(part.parent), tag=part.name, client_state=state, save_latest=False)
            offloaded.write(engine, part)
        except OSError as error:  # not from a write
            # The other ranks may wait for this one inside DeepSpeed, so they cannot agree on anything. This rank says
            # why and ends. The others end with it, or at the latest with the distributed timeout.
            raise CheckpointError(
                f"--save {part.parent}: rank {dist.get_rank()} could not write {part.stem}: {_reason(error)}; the "
                "checkpoint before it is whole"
            ) from error
    for rank, found in enumerate(gather(failures[:1])):
        if found:
            raise OSError(f"rank {rank}: {found[0]}")
    return written


@contextmanager
def _collected_failures(engine: Any) -> Iterator[tuple[list[Path], list[str]]]:
    """Inside the block, a file that cannot be written is noted and nothing is raised.

    DeepSpeed's save has barriers after its writes. A rank that raised would keep all others waiting.
    """
    written: list[Path] = []
    failures: list[str] = []
    owner = getattr(engine, "checkpoint_engine", None)
    if owner is None:
        yield written, failures
        return
    write = owner.save

    def guarded_write(state_dict: Any, path: str) -> None:
        if failures:  # the checkpoint is lost; more writes would only fill the disk
            return
        try:
            write(state_dict, path)
            written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
            failures.append(f"{os.path.basename(path)}: {_reason(error, os.path.dirname(path))}")

    with writes_by(engine, guarded_write):
        yield written, failures


def _check_in(part: Path, written: list[Path]) -> dict[str, FileEntry]:
    """Sizes and checksums of all ranks' files. Each rank waits until its own files are on the disk. Collective."""

    def own() -> dict[str, FileEntry]:
        for file in written:
            flush(file)
        return {str(file.relative_to(part)): file_entry(file) for file in written}

    return {name: each for found in gather(run_together(own)) for name, each in found.items()}


def _reason(error: Exception, directory: str | None = None) -> str:
    """A line about an error. torch.save hides why it could not write; another write into the directory shows it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if directory is not None:
        try:
            try_to_write(directory, _PROBE_BYTES)
        except OSError as found:
            return found.strerror or str(found)
    return first_line(error)


def _splits(engine: Any) -> dict[str, list[Any]]:
    """Name to [dim, sections] of each parameter that tensor parallelism divides; experts have the id 0."""
    model = getattr(engine, "module", None)
    rules = {} if model is None else {with_expert(n, 0): tensor_parallel_rule(p) for n, p in model.named_parameters()}
    return {name: [rule.dim, list(rule.sections)] for name, rule in rules.items() if rule is not None}
