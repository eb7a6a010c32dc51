"""`engine.load_checkpoint` of another model's checkpoint: one sentence instead of all the names that differ."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from scmoe_ds.errors import CheckpointError
from scmoe_ds.replace.origin import origin_in, origin_of


def refuse_other_models(engine: Any) -> None:
    """From here on, an engine's `load_checkpoint` that fails says so where the checkpoint is of another class.

    Raises, in `load_checkpoint`:
        CheckpointError: the class of the checkpoint's model, and that of the engine's.
    """
    load = engine.load_checkpoint

    def load_own(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(load_dir, tag, *args, **kwargs)
        except Exception as error:
            own, other = origin_of(engine.module)["class"], _class_in(engine, Path(load_dir), tag)
            if other in (None, own):
                raise
            raise CheckpointError(f"{load_dir}: is a checkpoint of {other}; the model is a {own}") from error

    engine.load_checkpoint = load_own


def _class_in(engine: Any, directory: Path, tag: Any) -> str | None:
    """Of the model of a checkpoint that AutoEP wrote under a schedule; None: it does not say."""
    with suppress(Exception):  # DeepSpeed's error is the one that is raised then
        name = str(tag or (directory / "latest").read_text(encoding="utf-8").strip())
        files = (directory / name).glob("*mp_rank_00_model_states.pt")
        file = min(each for each in files if not each.name.startswith("layer_"))
        header = engine.checkpoint_engine.load(str(file), map_location="cpu")
        return str((origin_in(header) or {})["class"])
    return None
