"""Every touch of a private name of transformers, and the version it was read in.

compat.py has those of the other packages. transformers is imported where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def alone_and_in_turn() -> Iterator[None]:
    """Inside the block, transformers makes whole models though a JSON with ZeRO-3 is in force, and reads one parameter
    after the other; by default it reads all ahead, and so holds everything twice (read in 5.24)."""
    from transformers.integrations import deepspeed as theirs

    before, theirs._hf_deepspeed_config_weak_ref = theirs._hf_deepspeed_config_weak_ref, None
    ahead = os.environ.get(_IN_TURN)
    os.environ[_IN_TURN] = "1"
    try:
        yield
    finally:
        theirs._hf_deepspeed_config_weak_ref = before
        os.environ.pop(_IN_TURN)
        if ahead is not None:
            os.environ[_IN_TURN] = ahead


def tied_names(model: Any) -> set[str]:
    """Weights of a transformers model that its files leave out: others stand for them (read in 5.24)."""
    return {*(getattr(model, "all_tied_weights_keys", None) or {}), *(model._keys_to_ignore_on_save or ())}


def used_conversions(model: Any) -> list[str] | None:
    """Which of its conversions transformers used when it loaded a model; None: it did not load it (read in 5.24)."""
    used = getattr(model, "_weight_conversions", None)
    return None if used is None else [repr(each) for each in used]


def use_conversions(model: Any, used: list[str] | None) -> None:
    """Lets a model be written with the conversions that `used_conversions` has named (read in 5.24)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    if used is not None:
        model._weight_conversions = [each for each in get_model_conversion_mapping(model) if repr(each) in used]


def revert_conversion(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformers model as its files have them (read in 5.24)."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, state))


def accept_names_of_recorders() -> None:
    """From 5.24 on, transformers' registry of what models record is asked with a model (read in 5.24.0). DeepSpeed
    0.19.8 asks, and puts an entry back, with the name of a class. `get` raised a TypeError, and the entry went to
    another place: models of the class that were there before recorded nothing. Both ways work afterwards."""
    from transformers.utils import output_capturing

    kind = type(getattr(output_capturing, "_CAN_RECORD_REGISTRY", {}))
    if kind is dict or getattr(kind.get, "takes_names", False):
        return
    by_model, put_by_model = kind.get, kind.__setitem__

    def get(self: Any, model: Any, default: Any = None) -> Any:
        return dict.get(self, model, default) if isinstance(model, str) else by_model(self, model)

    def put(self: Any, model: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(model, str) else put_by_model)(self, model, value)

    get.takes_names = True  # type: ignore[attr-defined]
    kind.get, kind.__setitem__ = get, put  # type: ignore[method-assign]  # on purpose
