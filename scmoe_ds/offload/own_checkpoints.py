"""Checkpoints of an engine whose experts are offloaded: DeepSpeed's own methods would leave these out in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from scmoe_ds.errors import CheckpointError

_METHODS = {
    "save_checkpoint": "call scmoe_ds.checkpoint.save",
    "load_checkpoint": "call scmoe_ds.checkpoint.load",
    "save_16bit_model": "export a checkpoint of scmoe_ds.checkpoint.save with scmoe convert",
    "save_fp16_model": "export a checkpoint of scmoe_ds.checkpoint.save with scmoe convert",
}


def sentence(what: str, remedy: str) -> str:
    """For the error."""
    return f"{what}: would leave out the experts, which scmoe.offload_experts keeps elsewhere; {remedy}"


def refuse_deepspeeds_own(engine: Any) -> None:
    """From here on the methods of an engine that save or load its model raise a CheckpointError."""
    for name, remedy in _METHODS.items():
        if (method := getattr(engine, name, None)) is not None:
            setattr(engine, name, _refusal(method, sentence(f"engine.{name}", remedy)))


def save_of(engine: Any) -> Callable[..., Any]:
    """DeepSpeed's `save_checkpoint`, for who writes the experts as well."""
    method: Callable[..., Any] = engine.save_checkpoint
    return getattr(method, "of_all_else", method)


def _refusal(method: Callable[..., Any], text: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise CheckpointError(text)

    refuse.of_all_else = method  # type: ignore[attr-defined]
    return refuse
