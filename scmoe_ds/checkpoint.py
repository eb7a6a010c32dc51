"""Checkpoints: DeepSpeed's own MoE format, plus a small JSON that says what the weights belong to.

A checkpoint of another model is then refused with the list of what differs, before DeepSpeed reads a single tensor.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from scmoe_ds.config import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.agreement import require_agreement, run_together

DESCRIPTION_FILE = "scmoe.json"
MANIFEST_FILE = "scmoe_files.json"

# Fields that neither the weights nor the optimizer state depend on; a resume may change them.
_FREE_MODEL_FIELDS = {"hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_method_std"}
_BINDING_SECTION_FIELDS = ("architecture", "position", "first_layer_position", "shortcut_distance", "moe_every",
                           "num_experts", "top_k", "merge", "shortcut_norm", "post_norm")  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used, and why."""


def describe(
    settings: GPTSettings, config: ScMoEConfig, world_size: int, deepspeed_json: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint's tensors depend on, as one flat JSON object."""
    precisions = [name for name in ("bf16", "fp16") if deepspeed_json.get(name, {}).get("enabled")]
    model = {key: value for key, value in asdict(settings).items() if key not in _FREE_MODEL_FIELDS}
    section = {f"scmoe.{key}": getattr(config, key) for key in _BINDING_SECTION_FIELDS}
    layout = {"scmoe.expert_parallel_size": config.expert_parallel_size, "number of processes": world_size,
              "zero_optimization.stage": deepspeed_json.get("zero_optimization", {}).get("stage", 0),
              "precision": precisions[0] if precisions else "fp32"}  # fmt: skip
    return model | section | layout


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Makes the directory and tries to write in it, on rank 0, now rather than after the first thousand steps.

    Raises:
        CheckpointError: on every rank.
    """

    def probe() -> None:
        try:
            os.makedirs(directory, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise CheckpointError(f"--save {directory}: cannot write there ({error.strerror}); "
                                  "choose another directory or mend its permissions") from None  # fmt: skip

    run_together(probe, on_rank_zero=True)


def save(engine: Any, directory: str, iteration: int, consumed_samples: int, description: Mapping[str, Any]) -> Path:
    """Writes `<directory>/global_step<iteration>`; all ranks call it.

    "latest" is switched as the last act, when every rank has written and the manifest is there: a save that is
    interrupted anywhere leaves the previous checkpoint in use.

    Returns:
        the checkpoint's directory.
    """
    path = Path(directory) / f"global_step{iteration}"

    def write_description() -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    run_together(write_description, on_rank_zero=True)
    state = {"iteration": iteration, "consumed_samples": consumed_samples, "overlap": engine.overlap.state()}
    engine.save_checkpoint(directory, tag=path.name, client_state=state, save_latest=False)
    dist.barrier()  # all ranks have written

    def publish() -> None:
        sizes = {file.name: file.stat().st_size for file in sorted(path.glob("*.pt"))}
        (path / MANIFEST_FILE).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        part = Path(directory) / "latest.part"
        part.write_text(path.name, encoding="utf-8")
        part.replace(part.with_name("latest"))  # whole or not at all

    run_together(publish, on_rank_zero=True)
    return path


def load(engine: Any, directory: str, description: Mapping[str, Any]) -> tuple[int, int]:
    """Restores the latest checkpoint of a directory: weights, optimizer, learning-rate schedule, measured times.

    Returns:
        (iteration, consumed samples); (0, 0) if the directory has no checkpoint yet.

    Raises:
        CheckpointError: a checkpoint of another model or layout (lists what differs), or a damaged one.
    """
    tag = find(directory, description)
    if tag is None:
        return 0, 0
    try:
        path, state = engine.load_checkpoint(directory, tag=tag)
    except (RuntimeError, OSError, EOFError, KeyError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"--load {directory}/{tag}: the checkpoint cannot be read "
                              f"({type(error).__name__}: {reason[0] if reason else ''}); it is damaged or incomplete, "
                              f"name an earlier one in {directory}/latest") from error  # fmt: skip
    if path is None:
        raise CheckpointError(
            f"--load {directory}/{tag}: DeepSpeed found no model file there; the checkpoint is incomplete"
        )
    engine.overlap.resume(state.get("overlap"))
    return int(state["iteration"]), int(state["consumed_samples"])


def find(directory: str, description: Mapping[str, Any]) -> str | None:
    """The latest checkpoint's tag if it fits this run and is complete; None if the directory has none yet.

    Collective, and cheap: a run can ask before it builds its engine.

    Raises:
        CheckpointError: as `load`, on every rank.
    """
    tag = run_together(lambda: _latest_fitting(Path(directory), description))
    require_agreement("the latest checkpoint", tag)
    return tag


def _check_complete(directory: Path) -> None:
    """Compares the files with the sizes that were noted when all ranks had written."""
    try:
        sizes = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"--load {directory}: no readable {MANIFEST_FILE}; the save was interrupted. Name an "
                              f"earlier checkpoint in {directory.parent}/latest") from None  # fmt: skip
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"--load {directory}: {name} {state}; the checkpoint is damaged or incomplete. Name "
                                  f"an earlier one in {directory.parent}/latest")  # fmt: skip


def _latest_fitting(directory: Path, description: Mapping[str, Any]) -> str | None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"--load {directory}: is a file, not a directory of checkpoints")
    latest = directory / "latest"
    if not latest.is_file():
        return None
    tag = latest.read_text(encoding="utf-8").strip()
    file = directory / tag / DESCRIPTION_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"--load {directory}: latest names {tag}, but {file} cannot be read ({error.strerror}); "
                              "is it a checkpoint of pretrain_gpt_scmoe.py?") from None  # fmt: skip
    except ValueError:
        raise CheckpointError(f"--load {directory}: {file} is damaged (not JSON)") from None
    wanted = json.loads(json.dumps(description))
    keys = [key for key in wanted | saved if wanted.get(key) != saved.get(key)]
    if keys:
        listed = "; ".join(
            f"{key}: {saved.get(key)!r} in the checkpoint, {wanted.get(key)!r} in this run" for key in keys
        )
        raise CheckpointError(f"--load {directory}/{tag} is a checkpoint of another model or layout: {listed}")
    _check_complete(directory / tag)
    return tag
