"""Trained models as scmoe adapt --measure sees them: the ways to convert them, and a student for each."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from scmoe_ds.analysis.adaptation_times import Shape, Way
from scmoe_ds.analysis.subjects import Subject, gpt_subject
from scmoe_ds.checkpoint.parsing import without_memory
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.names import Join, Position
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.inference.load import trained_tokenizer
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.flags.tokenizer import named_tokenizer

POSITIONS: tuple[Position, ...] = get_args(Position)
JOINS: tuple[Join, ...] = get_args(Join)


@dataclass(frozen=True)
class Opened:
    """A student in memory, with no layer converted.

    Attributes:
        model: in evaluation mode; it is called like a GPT.
        conversion: of its MoE layers.
        subject: where its representations are. Unconverted, they are the source's.
    """

    model: Any
    conversion: Conversion
    subject: Subject


@dataclass(frozen=True)
class AdaptSource:
    """A trained model.

    Attributes:
        ways: that it can be converted in, all of those that the flags leave open; at least one.
        default: the one that is taken where nobody chooses.
        open: the source after surgery for a way.
        tokenizer: of the model.
        shape: what the times of its pairs depend on.
        stored_times: what a checkpoint has kept of a calibration; None: nothing.
    """

    ways: Sequence[Way]
    default: Way
    open: Callable[[Way], Opened]
    tokenizer: Tokenizer
    shape: Shape
    stored_times: Any = None


def asked_ways(args: argparse.Namespace) -> list[Way]:
    """Every position and join, or those of --position and --join."""
    positions = POSITIONS if args.position is None else (args.position,)
    joins = JOINS if args.join is None else (args.join,)
    return [Way(position, join, args.first_layer_position) for position in positions for join in joins]


def default_way(args: argparse.Namespace, ways: Sequence[Way], position: Position) -> Way:
    """The one of --position and --join, else that of a position at the end."""
    asked = Way(args.position or position, args.join or "end", args.first_layer_position)
    return asked if asked in ways else ways[0]


def possible(ways: Sequence[Way], attempt: Callable[[Way], object]) -> list[Way]:
    """The ways for which `attempt` raises no ScMoEConfigError. Raises the first one's if there is none."""
    found, errors = [], []
    for way in ways:
        try:
            attempt(way)
            found.append(way)
        except ScMoEConfigError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def gpt_source(
    args: argparse.Namespace, source: SourceModel, changes: Mapping[str, Any], busiest: Sequence[int] | None = None
) -> AdaptSource:
    """A GPT of this package.

    Args:
        args: the flags.
        source: what --source names.
        changes: fields of its section that are not as in the source.
        busiest: for each MoE layer, the expert that becomes the shared one; None: their mean does.

    Raises:
        CheckpointError, DataError, ScMoEConfigError: what a user can correct.
    """
    trained = TrainedModel.open(args.source, contents=False)
    tokenizer = trained_tokenizer(args.source, trained, named_tokenizer(args))

    def config_of(way: Way) -> ScMoEConfig:
        return source.with_base(source.student({**changes, **dataclasses.asdict(way)}))

    def attempt(way: Way) -> None:
        without_memory(lambda: GPT(source.settings, serving_config(config_of(way))), trained.path)

    def open_(way: Way) -> Opened:
        config = config_of(way)
        student = dataclasses.replace(trained, weights=source.surgery(config, busiest), config=config)
        model = load_model(student, serving_config(config), DTYPES[args.dtype or trained.dtype], device())
        model.conversion.only(())
        return Opened(model, model.conversion, gpt_subject(model))

    ways = possible(asked_ways(args), attempt)
    config = config_of(ways[0])
    assert config.adapt is not None and config.adapt.base is not None
    shape = Shape(
        experts=config.experts_of_layers(config.moe_layers(source.settings.num_layers)),
        moe_every=config.moe_every,
        distance=config.shortcut_distance,
        top_k=(config.adapt.base.top_k, config.top_k),
        shared=(source.has_shared_expert, True),
    )
    stored = getattr(source.weights, "header", {}).get("overlap")
    position: Position = "pos1" if config.moe_every == 1 else "pos2"
    return AdaptSource(ways, default_way(args, ways, position), open_, tokenizer, shape, stored)
