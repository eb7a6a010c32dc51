"""What an engine's checkpoints say about their model: `engine.load_checkpoint` of another model's is one sentence."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import CheckpointError
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.schedule_text import layers_text
from scmoe_ds.replace.adapted_parts import settings_now
from scmoe_ds.replace.origin import Origin, is_converted, note_settings, origin_in, origin_of, settings_noted


def note_conversion(engine: Any) -> None:
    """From here on, a checkpoint says which layers were converted when it was written."""
    save = engine.save_checkpoint
    settings = settings_noted(engine.module)

    def save_noted(*args: Any, **kwargs: Any) -> Any:
        note_settings(engine.module, settings_now(settings, engine.conversion))
        return save(*args, **kwargs)

    engine.save_checkpoint = save_noted


def refuse_other_models(engine: Any, section: ScMoEConfig) -> None:
    """From here on, an engine's `load_checkpoint` that fails says so where the checkpoint is of another class. One of a
    model that was adapted otherwise has the same names and shapes, and is refused, too. The log says which layers are
    converted only now.

    Raises, in `load_checkpoint`:
        CheckpointError: the class of the checkpoint's model, and that of the engine's; or a setting that differs.
    """
    load = engine.load_checkpoint

    def load_own(load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            result = load(load_dir, tag, *args, **kwargs)
        except Exception as error:
            own, other = origin_of(engine.module)["class"], _class_in(engine, Path(load_dir), tag)
            if other in (None, own):
                raise
            raise CheckpointError(f"{load_dir}: is a checkpoint of {other}; the model is a {own}") from error
        if result[0] is not None:
            there = origin_in(result[1])
            _check_settings(load_dir, there, engine)
            if section.adapt is None or not section.adapt.convert_every:  # which says how many are
                _log_newly_converted(load_dir, there, engine)
        return result

    engine.load_checkpoint = load_own


def _check_settings(directory: Any, there: Origin | None, engine: Any) -> None:
    """Fewer layers may have been converted than can be: they are converted step by step."""
    if there is None or not is_converted(there):
        return
    own = origin_of(engine.module).get("scmoe") or {}
    for field, value in there["scmoe"].items():
        if field != "adapt" and own.get(field) != value:
            raise CheckpointError(
                f"{directory}: was trained with scmoe.{field} = {json.dumps(value)}, and the model has "
                f"{json.dumps(own.get(field))}; set the same"
            )
    from scmoe_ds.replace.autoep import autoep_layers  # AutoEP may be missing in this DeepSpeed

    layers = (there["scmoe"].get("adapt") or {}).get("layers")
    can_be = set(engine.conversion.numbers)
    lost = sorted(set(range(len(autoep_layers(engine.module))) if layers is None else layers) - can_be)
    if lost:
        raise CheckpointError(
            f"{directory}: was trained with MoE layer {lost[0]} converted, which scmoe.adapt.layers leaves out; name it"
        )


def _log_newly_converted(directory: Any, there: Origin | None, engine: Any) -> None:
    converted = (((there or {}).get("scmoe") or {}).get("adapt") or {}).get("layers")
    if converted is not None and (new := sorted(set(engine.conversion.converted) - set(converted))):
        before = f"MoE layer {layers_text(converted)}" if converted else "no MoE layer"
        log(
            f"conversion: {directory} was trained with {before} converted; MoE layer {layers_text(new)} runs as ScMoE "
            "from here on, too, as scmoe.adapt.layers says",
            level=logging.WARNING,
        )


def _class_in(engine: Any, directory: Path, tag: Any) -> str | None:
    """Of the model of a checkpoint that AutoEP wrote under a schedule; None: it does not say."""
    with suppress(Exception):  # DeepSpeed's error is the one that is raised then
        name = str(tag or (directory / "latest").read_text(encoding="utf-8").strip())
        files = (directory / name).glob("*mp_rank_00_model_states.pt")
        file = min(each for each in files if not each.name.startswith("layer_"))
        header = engine.checkpoint_engine.load(str(file), map_location="cpu")
        return str((origin_in(header) or {})["class"])
    return None
