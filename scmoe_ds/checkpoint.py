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

from scmoe_ds.config import ScMoEConfig
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.parallel.agreement import require_agreement, run_together

DESCRIPTION_FILE = "scmoe.json"

# Fields that neither the weights nor the optimizer state depend on; a resume may change them.
_FREE_MODEL_FIELDS = {"hidden_dropout", "attention_dropout", "layernorm_epsilon", "init_method_std"}
_BINDING_SECTION_FIELDS = ("architecture", "position", "first_layer_position", "shortcut_distance", "moe_every",
                           "num_experts", "top_k", "merge", "shortcut_norm", "post_norm")  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used, and why."""


def describe(settings: GPTSettings, config: ScMoEConfig, world_size: int, zero_stage: int) -> dict[str, Any]:
    """What a checkpoint's tensors depend on, as one flat JSON object."""
    model = {key: value for key, value in asdict(settings).items() if key not in _FREE_MODEL_FIELDS}
    section = {f"scmoe.{key}": getattr(config, key) for key in _BINDING_SECTION_FIELDS}
    layout = {"scmoe.expert_parallel_size": config.expert_parallel_size, "number of processes": world_size,
              "zero_optimization.stage": zero_stage}  # fmt: skip
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

    Returns:
        the checkpoint's directory.
    """
    path = Path(directory) / f"global_step{iteration}"

    def write_description() -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

    # Before DeepSpeed's files: it points "latest" at the checkpoint as its last act.
    run_together(write_description, on_rank_zero=True)
    state = {"iteration": iteration, "consumed_samples": consumed_samples}
    engine.save_checkpoint(directory, tag=path.name, client_state=state)
    return path


def load(engine: Any, directory: str, description: Mapping[str, Any]) -> tuple[int, int]:
    """Restores the latest checkpoint of a directory: weights, optimizer, learning-rate schedule.

    Returns:
        (iteration, consumed samples); (0, 0) if the directory has no checkpoint yet.

    Raises:
        CheckpointError: a checkpoint of another model or layout (lists what differs), or a damaged one.
    """
    tag = run_together(lambda: _latest_fitting(Path(directory), description))
    require_agreement("the latest checkpoint", tag)
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
    return int(state["iteration"]), int(state["consumed_samples"])


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
    return tag
