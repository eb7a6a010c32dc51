"""Checkpoints of an engine whose experts are offloaded: DeepSpeed's own methods know nothing of their states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from scmoe_ds.errors import CheckpointError

_HELD = "scmoe.offload_experts holds the experts' fp32 weights and moments"
_SENTENCES = {
    "save_checkpoint": f"{_HELD}, which would be lacking; call scmoe_ds.checkpoint.save",
    "load_checkpoint": f"{_HELD}, which would not be set; call scmoe_ds.checkpoint.load",
    **dict.fromkeys(
        ("save_16bit_model", "save_fp16_model"),
        "with scmoe.offload_experts would write rank 0's experts alone; call scmoe_ds.save_pretrained",
    ),
}
LOAD_STATE_DICT = (
    f"load_state_dict: {_HELD}, which a state dict lacks; load it before scmoe_ds.initialize, or a checkpoint with "
    "scmoe_ds.checkpoint.load"
)


def refuse_deepspeeds_own(engine: Any) -> None:
    """From here on the methods of an engine that save or load its model raise a CheckpointError."""
    for name, rule in _SENTENCES.items():
        if (method := getattr(engine, name, None)) is not None:
            setattr(engine, name, _refusal(method, f"engine.{name}: {rule}"))


def save_of(engine: Any) -> Callable[..., Any]:
    """DeepSpeed's `save_checkpoint`, for who writes the experts as well."""
    method: Callable[..., Any] = engine.save_checkpoint
    return getattr(method, "of_all_else", method)


def _refusal(method: Callable[..., Any], text: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise CheckpointError(text)

    refuse.of_all_else = method  # type: ignore[attr-defined]
    return refuse
