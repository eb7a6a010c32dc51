"""The one loader of a checkpoint's .pt files. It accepts tensors, containers and four classes of DeepSpeed, no others.

A .pt file is a pickle, and a pickle can run any code when it is read. DeepSpeed reads its checkpoints without a
restriction; `fed_by_us` makes it read through this module.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from scmoe_ds.checkpoint import files
from scmoe_ds.compat import reads_by
from scmoe_ds.errors import CheckpointError, first_line
from scmoe_ds.parallel.agreement import run_together

_FORBIDDEN = re.compile(r"(?:GLOBAL|function) ([\w.]+)")
"""In torch's messages, before the name of the class that it refuses."""


def _zero_stage(owner: Any, name: str) -> Any:
    """Replaces `getattr`, with which Python up to 3.11.3 pickles a member of an enumeration."""
    if owner is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"Unsupported function builtins.getattr of {owner!r}")
    return ZeroStageEnum(ZeroStageEnum.__members__[name])


_SAFE_CLASSES: list[Any] = [
    fragment_address,
    ZeroStageEnum,
    loss_scaler.LossScaler,
    loss_scaler.DynamicLossScaler,
    (_zero_stage, "builtins.getattr"),
]


def read(file: Path, flag: str = "--load", mapped: bool = True) -> Any:
    """The content of a .pt file, on the CPU.

    Args:
        mapped: memory-map the tensors; otherwise they are read now.

    Raises:
        CheckpointError: it holds a class that checkpoints do not have.
        DamagedCheckpointError: it cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_SAFE_CLASSES), file.open("rb") as opened:
            mapped = mapped and opened.read(2) == b"PK"  # "checkpoint_serialization": false writes no zip file
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises nearly anything about damaged bytes
        forbidden = _FORBIDDEN.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if forbidden is not None:
            raise CheckpointError(
                f"{flag} {file.parent}: {file.name} holds {forbidden[1]}, which is no part of a checkpoint and could "
                "run code: it was not read. Name a checkpoint that pretrain_gpt_scmoe.py has written"
            ) from None
        # torch's first line about a pickle advises to trust it.
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        what = f"{file.name} cannot be read ({type(error).__name__}: {reason})"
        raise files.damaged(file.parent, what, flag) from None


def check(directory: Path, flag: str) -> None:
    """Checks that `read` accepts every file, without reading the tensors. Each rank checks a share. Collective.

    Raises:
        CheckpointError: on every rank, with the first file that a rank refuses.
    """

    def check_share() -> None:
        manifest = files.read_manifest(directory, flag)
        for name in files.own_share(sorted(name for name in manifest if name.endswith(".pt"))):
            read(directory / name, flag)

    run_together(check_share)


@contextmanager
def as_expected(directory: Path, flag: str) -> Iterator[None]:
    """Turns an error about unexpected content of tensor files into one sentence. Raises a DamagedCheckpointError
    instead, but lets `read`'s own errors pass"""
    try:
        yield
    except CheckpointError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, OSError) as error:
        what = f"the checkpoint cannot be read ({type(error).__name__}: {first_line(error)})"
        raise files.damaged(directory, what, flag) from error


@contextmanager
def fed_by_us(engine: Any, directory: Path, tensor_ranks: int, flag: str) -> Iterator[None]:
    """Inside the block, DeepSpeed's `load_checkpoint` reads only files that the manifest names, with `read`."""
    known = files.read_manifest(directory, flag)

    def load(path: str, map_location: Any = None) -> Any:
        files.require_named(Path(path).name, directory, known, flag)
        return read(directory / Path(path).name, flag, mapped=False)

    model_files = [str(directory / f"mp_rank_{rank:02d}_model_states.pt") for rank in range(tensor_ranks)]
    with reads_by(engine, load, model_files):
        yield
