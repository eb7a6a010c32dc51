"""Flags of pretraining for `scmoe.adapt`: who teaches the model, by which loss, and which layers are converted."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scmoe_ds.errors import ArgumentError, ScMoEConfigError

FIELDS: dict[str, str] = {
    "adapt_from": "adapt.source",
    "distill_from": "adapt.source",
    "adapt_layers": "adapt.layers",
    "convert_every": "adapt.convert_every",
    "distill_alpha": "adapt.distill.alpha",
    "distill_beta": "adapt.distill.beta",
    "distill_gamma": "adapt.distill.gamma",
    "distill_temperature": "adapt.distill.temperature",
    "teacher_logits": "adapt.distill.teacher_logits",
    "teacher_top_n": "adapt.distill.teacher_top_n",
}
"""Flag (as argparse stores it) to field of the "scmoe" section."""


def add_distill(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group(
        "conversion and self-distillation",
        'set fields of the JSON\'s "scmoe.adapt"; the loss is alpha * KL + beta * LM + gamma * match',
    )
    group.add_argument("--adapt-from", metavar="SOURCE", help="start from a trained model's weights as a ScMoE")
    group.add_argument("--distill-from", metavar="SOURCE", help="as --adapt-from, and learn from the model that it was")
    group.add_argument("--distill-alpha", type=float, help="weight of the divergence from the teacher; default: 1")
    group.add_argument("--distill-beta", type=float, help="weight of the language-model loss; default: 1")
    group.add_argument(
        "--distill-gamma", type=float, help="weight of the distance from the teacher's MoE blocks; default: 0"
    )
    group.add_argument("--distill-temperature", type=float, help="T, which divides both models' logits; default: 1")
    group.add_argument(
        "--teacher-logits", metavar="DIR", help="keep the teacher's best logits there, and no teacher in memory"
    )
    group.add_argument("--teacher-top-n", type=int, help="tokens per place in --teacher-logits; default: 64")
    group.add_argument("--adapt-layers", type=int, nargs="+", help="MoE layers to convert, from 0; default: all")
    group.add_argument("--convert-every", type=int, help="convert one more layer every N iterations; default: all now")


def check_adapt(section: Any, save: str | None) -> None:
    """Refuses a `ScMoEConfig` with an `adapt` that would do nothing, or harm.

    Args:
        save: --save.

    Raises:
        ScMoEConfigError: `adapt.distill` without `adapt.source`, layers to convert without what they are converted
            from, or none of them.
        ArgumentError: checkpoints of the student would be saved among its source's.
    """
    adapt = section.adapt
    if adapt is None:
        return
    if save and adapt.source is not None and Path(save).resolve() == Path(adapt.source).resolve():
        raise ArgumentError(
            f"--save {save}: is the source (scmoe.adapt.source), whose checkpoints the student's would replace; name "
            "another directory"
        )
    if adapt.layers == []:
        raise ScMoEConfigError("scmoe.adapt.layers = []: names no MoE layer to convert; name some, or null for all")
    if adapt.distill is not None and adapt.source is None:
        raise ScMoEConfigError(
            "scmoe.adapt.source = null: scmoe.adapt.distill needs the trained model that teaches; name it, or give "
            "--distill-from SOURCE"
        )
    if adapt.source is None and adapt.base is None and (adapt.layers is not None or adapt.convert_every):
        field = "layers" if adapt.layers is not None else "convert_every"
        raise ScMoEConfigError(
            f"scmoe.adapt.{field} = {getattr(adapt, field)}: how the other layers run is not known; name the trained "
            "model by --adapt-from SOURCE, or take scmoe.adapt.base from the section of the model that you load"
        )


def merge_distill(args: argparse.Namespace, section: Any, put: Callable[[str, Any, str], None]) -> None:
    """Puts what the flags say into the section.

    Args:
        section: the JSON's "scmoe" so far.
        put: takes a field of the section, its value, and the flag.
    """
    given = {name: value for name in FIELDS if (value := getattr(args, name, None)) is not None}
    if not given or not isinstance(section, dict):
        return
    adapt = section["adapt"] = section.get("adapt") or {}
    teaches = any("distill" in f"{name} {FIELDS[name]}" for name in given)
    if teaches and isinstance(adapt, dict):
        adapt["distill"] = adapt.get("distill") or {}
    for name, value in given.items():
        put(FIELDS[name], value, "--" + name.replace("_", "-"))
