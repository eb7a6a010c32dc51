"""Writes a DeepSpeed checkpoint of an AutoEP run as a Hugging Face directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.checkpoint.autoep.blueprint import Blueprint
from scmoe_ds.checkpoint.autoep.loading import adapted_in, empty_model
from scmoe_ds.checkpoint.autoep.trained import Trained, locate
from scmoe_ds.compat_transformers import alone_and_in_turn, use_conversions
from scmoe_ds.config.deepspeed_json import at
from scmoe_ds.errors import CheckpointError, one_line
from scmoe_ds.replace.modeling_adapted import add_parts
from scmoe_ds.replace.origin import Origin, is_converted, origin, origin_in


def export_hugging_face(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    original: Path | None = None,
) -> int:
    """Writes what `AutoModelForCausalLM.from_pretrained` reads, with one shard in memory at a time.

    Args:
        source: a checkpoint of `engine.save_checkpoint` with AutoEP layers, or a directory of them (the latest).
        out: a directory that is empty or does not exist.
        dtype: of the parameters. None: the model's. A wider one reads the optimizer's fp32 weights.
        shard_bytes: most bytes of a file; a larger unit gets its own.
        original: the directory of the model that was trained, for config.json, tokenizer and generation settings;
            None: as the checkpoint says.

    Returns:
        the number of shards.

    Raises:
        CheckpointError: the checkpoint is of another model or of no AutoEP run, it is damaged, or `out` cannot be
            written.
    """
    trained = Trained(locate(source), dtype)
    note = _origin(trained, original)
    model = _empty(note)
    use_conversions(model, note["conversions"])
    blueprint = Blueprint(model, trained.config.get("expert_parallel") or {})
    _check_names(trained, blueprint)
    most = shard_bytes // trained.dtype.itemsize
    laid_out = shards.lay_out(
        (replace(unit, owner=shards.OTHERS) for unit in shards.units_of(blueprint, 1, most)), most
    )
    part = shards.claim(out)
    with shards.one_sentence(out):
        total = 0
        for shard in laid_out:
            states = (shards.read_unit(unit, trained, blueprint) for unit in shard.units)
            total += shards.write_shard(shard, part, states)
        shards.write_index(laid_out, part, total)
        shards.write_others(part, note, model, trained.dtype, trained.config)
        shards.publish(part, out)
    return len(laid_out)


def _origin(trained: Trained, original: Path | None) -> Origin:
    found = origin_in(trained.header)
    if original is not None:
        if not original.is_dir():  # transformers would look for it on the hub
            raise CheckpointError(f"--model {original}: no such directory; name the one with the model's config.json")
        kept = {name: (found or {}).get(name) for name in ("conversions", "scmoe")}
        return {**origin(empty_model(original), original, adapted_in(original)), **kept}
    if found is None:
        raise CheckpointError(
            f"{trained.path}: does not say which model it is of; name the directory with the model's config.json by "
            "--model"
        )
    return found


def _check_names(trained: Trained, blueprint: Blueprint) -> None:
    """What the model would leave out makes the checkpoint another model's; a block keeps more than its weights."""
    known = {*blueprint.other_names.values(), *blueprint.model.state_dict()}
    blocks = tuple(f"{block.path}." for block in blueprint.blocks)
    if at(trained.config, "scmoe.architecture") == "scmoe":  # what a layer that is not converted yet has more
        known |= {name for name in trained.header["module"] if ".shortcut." in name}
    if others := [name for name in trained.header["module"] if name not in known and not name.startswith(blocks)]:
        raise CheckpointError(
            f"{trained.path}: holds {others[0]}, which {type(blueprint.model).__name__} does not have; it is of "
            "another model"
        )


def _empty(note: Origin) -> Any:
    """The model of a note, on the meta device."""
    try:
        config = transformers.AutoConfig.for_model(**json.loads(note["config"]))
        kind = getattr(transformers, note["class"], None)
        with torch.device("meta"), alone_and_in_turn():
            if kind is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = kind(config if kind.config_class is type(config) else config.get_text_config())
            if is_converted(note):
                add_parts(model, note["scmoe"])
            return model
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{note['class']}: transformers makes no model of its config ({one_line(error)})"
        ) from None
