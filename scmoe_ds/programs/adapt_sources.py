"""Trained models as scmoe adapt --measure sees them: the ways to convert them, and a student for each."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist

from scmoe_ds.analysis.adaptation_times import Shape, Way
from scmoe_ds.analysis.feasibility import Times
from scmoe_ds.analysis.subjects import Subject, gpt_subject, hugging_face_subject
from scmoe_ds.checkpoint.adapted.student import HuggingFaceStudent
from scmoe_ds.checkpoint.adapted.text import TextSettings
from scmoe_ds.checkpoint.parsing import without_memory
from scmoe_ds.checkpoint.source_model import SourceModel
from scmoe_ds.config.names import Join, Position
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.data.tokenizer import Tokenizer, build_tokenizer
from scmoe_ds.errors import CheckpointError, ScMoEConfigError, UserError
from scmoe_ds.evaluation.held_out import CausalModel
from scmoe_ds.inference.load import trained_tokenizer
from scmoe_ds.inference.model import DTYPES, TrainedModel, load_model, serving_config
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.identity import Identity, identity
from scmoe_ds.moe.conversion import Conversion
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.parallel.process import device
from scmoe_ds.programs.adapt_times import time_pairs
from scmoe_ds.programs.flags.tokenizer import named_tokenizer

POSITIONS: tuple[Position, ...] = get_args(Position)
JOINS: tuple[Join, ...] = get_args(Join)
_REMEDY = (
    "deepspeed --module scmoe_ds.programs.adapt SOURCE --measure TEXT, on the training's ranks, measures them; or give "
    "a training's calibration_file as --calibration"
)
_REMEDY_OF_AUTOEP = (
    'train a few steps under AutoEP with "architecture": "scmoe" and "overlap": {"calibration_file": …}, and give that '
    "file as --calibration"
)


@dataclass(frozen=True)
class Opened:
    """A student in memory, with no layer converted.

    Attributes:
        model: in evaluation mode, as a `Scorer` calls it.
        conversion: of its MoE layers.
        subject: where its representations are. Unconverted, they are the source's.
        identity: its sizes, as a calibration has them.
    """

    model: Any
    conversion: Conversion
    subject: Subject
    identity: Identity


@dataclass(frozen=True)
class AdaptSource:
    """A trained model.

    Attributes:
        ways: that it can be converted in, all of those that the flags leave open; at least one.
        default: the one that is taken where nobody chooses.
        open: the source after surgery for a way. What it has opened before may not be used any more.
        tokenizer: of the model.
        shape: what the times of its pairs depend on.
        remedy: how times come about, where none are known.
        stored_times: what a checkpoint has kept of a calibration; None: nothing.
        time: times its pairs on the ranks of this run, collectively; None: nothing to time.
    """

    ways: Sequence[Way]
    default: Way
    open: Callable[[Way], Opened]
    tokenizer: Tokenizer
    shape: Shape
    remedy: str
    stored_times: Any = None
    time: Callable[[], Times] | None = None


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
    """The ways for which `attempt` raises no error of a setting. Raises the first one's if there is none."""
    found: list[Way] = []
    errors: list[UserError] = []
    for way in ways:
        try:
            attempt(way)
            found.append(way)
        except (ScMoEConfigError, CheckpointError) as error:
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

    ranks, every = (
        dist.get_world_size(),
        source.config.experts_of_layers(source.config.moe_layers(source.settings.num_layers)),
    )
    layout = Layout(ranks, expert_size=math.gcd(ranks, *every))
    tensor.start_tensor_parallel(layout.tensor_size)

    def attempt(way: Way) -> None:
        without_memory(lambda: GPT(source.settings, serving_config(config_of(way))), trained.path)

    def open_(way: Way) -> Opened:
        config = config_of(way)
        student = dataclasses.replace(trained, weights=source.surgery(config, busiest), config=config)
        model = load_model(
            student, serving_config(config, layout.expert_size), DTYPES[args.dtype or trained.dtype], device()
        )
        model.conversion.only(())
        return Opened(model, model.conversion, gpt_subject(model), identity(model))

    def time() -> Times:
        way = max(ways, key=lambda each: (each.position, each.join == "end"))  # whose window has the others' operators
        length = args.seq_length or source.settings.max_position_embeddings
        model = open_(way).model
        return time_pairs(model, model.config, layout, (args.batch_size, length))

    ways = possible(asked_ways(args), attempt)
    config = config_of(ways[0])
    assert config.adapt is not None and config.adapt.base is not None
    shape = Shape(
        experts=every,
        moe_every=config.moe_every,
        distance=config.shortcut_distance,
        top_k=(config.adapt.base.top_k, config.top_k),
        shared=(source.has_shared_expert, True),
    )
    stored = getattr(source.weights, "header", {}).get("overlap")
    position: Position = "pos1" if config.moe_every == 1 else "pos2"
    timed = time if layout.expert_size > 1 else None
    return AdaptSource(ways, default_way(args, ways, position), open_, tokenizer, shape, _REMEDY, stored, timed)


def hugging_face_source(args: argparse.Namespace, path: Path, fields: Mapping[str, Any]) -> AdaptSource:
    """A model of transformers with MoE layers, which is in memory once, whatever way it is converted in.

    Args:
        args: the flags.
        path: its directory.
        fields: of the "scmoe" section, as for `adapt_hugging_face`; those of a `Way` are not read.

    Raises:
        CheckpointError, DataError, ScMoEConfigError: what a user can correct.
    """
    text = None
    if args.text_file is not None:
        text = TextSettings(Path(args.text_file), args.seq_length, args.batch_size, args.max_tokens)
    kept = {name: value for name, value in fields.items() if name not in (*Way.__annotations__, "layers")}
    tokenizer = named_tokenizer(args) or build_tokenizer("HuggingFaceTokenizer", tokenizer_model=str(path))
    student = HuggingFaceStudent(path, kept, DTYPES[args.dtype] if args.dtype else None, device(), text)
    ways = possible(asked_ways(args), lambda way: student.convert(dataclasses.asdict(way)))
    model = CausalModel(student.model)

    def open_(way: Way) -> Opened:
        conversion = Conversion(student.convert(dataclasses.asdict(way)))
        conversion.only(())
        return Opened(model, conversion, hugging_face_subject(student.model), identity(student.model))

    blocks = [block for _, block in hugging_face_subject(student.model).moe_blocks]
    gaps = [later - earlier for earlier, later in itertools.pairwise(blocks)]
    shape = Shape(student.experts, min(gaps, default=1), 1, student.top_k, student.shared_expert)
    return AdaptSource(ways, default_way(args, ways, "pos1"), open_, tokenizer, shape, _REMEDY_OF_AUTOEP)
