"""A model from a file: a Hugging Face config.json, or sizes as JSON, which has the fields of `model.Model`."""

from __future__ import annotations

import os
from pathlib import Path

from scmoe_ds.errors import ModelError
from scmoe_ds.simulate.hugging_face import model_of_config
from scmoe_ds.simulate.json_files import read_object, validated
from scmoe_ds.simulate.model import Model

_CONFIG = "config.json"


def read_model(source: str | Path, tokens: int | None = None) -> Model:
    """
    Args:
        source: a file, a directory with a config.json, or the name of a model in Hugging Face's cache.
        tokens: of a sample; None: the file's, or as many as the model takes, 4096 at most.

    Raises:
        ModelError: nothing of the kind, unreadable, or with sizes that contradict each other.
    """
    path = Path(source)
    file = path / _CONFIG if path.is_dir() else path if path.is_file() else _cached(str(source))
    values = read_object(file, ModelError)
    if "stages" not in values:
        return model_of_config(values, str(file), tokens)
    model = validated(Model, {"name": file.stem, "source": str(file), **values}, str(file), ModelError)
    if tokens is None or model.images:
        return model
    stages = tuple(
        stage.model_copy(
            update={"tokens": tokens, "span": tokens if stage.span == stage.tokens else min(stage.span, tokens)}
        )
        for stage in model.stages
    )
    return model.model_copy(update={"stages": stages})


def _cached(name: str) -> Path:
    """The config.json of a model that Hugging Face's libraries have downloaded; nothing is downloaded here."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = cache / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob(f"*/{_CONFIG}"), key=lambda each: each.stat().st_mtime)
    if not found:
        raise ModelError(
            f"--model {name}: is no file, no directory with a {_CONFIG}, and not in {cache}; name a {_CONFIG}, which "
            "every model on the Hub has, or write the sizes as JSON (docs/plan.md)"
        )
    return found[-1]
