"""One training step of the real program on a GPU, or a CPU, that is not there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import scmoe_ds
from scmoe_ds.check.cards import Card
from scmoe_ds.check.cuda import standing_in
from scmoe_ds.check.fakes import Fakes, building, without_values
from scmoe_ds.check.kernels import of_gpu, without_memory
from scmoe_ds.check.mistakes import in_one_sentence
from scmoe_ds.check.rows import even_routing
from scmoe_ds.check.storages import Storages
from scmoe_ds.check.work import Work, WorkCounter
from scmoe_ds.check.world import world
from scmoe_ds.config.batch_sizes import batch_sizes
from scmoe_ds.config.deepspeed_settings import check_accelerator
from scmoe_ds.config.loading import LoadedConfig, load
from scmoe_ds.models.flops import forward_flops
from scmoe_ds.parallel import tensor
from scmoe_ds.training.loop import Trainer
from scmoe_ds.training.settings import TrainingSettings
from scmoe_ds.training.start_text import parameters_of
from scmoe_ds.training.utilization import compute_dtype

_PARAMETERS, _STATE, _GRADIENTS = "parameters", "optimizer state", "gradients"
_ACTIVATIONS, _BUFFERS, _TEMPORARIES = "activations", "communication buffers", "temporaries"


@dataclass(frozen=True)
class Place:
    """Where the step would run.

    Attributes:
        rank, ranks: of the world.
        per_node: ranks of a node.
        tensor_parallel: ranks that share a layer.
        card: kind of GPU.
        device: "cuda"; "cpu" for ranks without GPUs.
    """

    rank: int
    ranks: int
    per_node: int
    tensor_parallel: int
    card: Card
    device: str = "cuda"


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        build: makes the model.
        trainer: the loop's class.
        sample: shapes and dtypes of one sample of a batch, by name.
        seq_length: tokens of a sample; 1 for images.
    """

    build: Callable[[], nn.Module]
    trainer: type[Trainer]
    sample: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    seq_length: int


@dataclass(frozen=True)
class Findings:
    """Of one rank and one step.

    Attributes:
        parameters: number on this rank.
        memory: bytes by what they are for, at the moment when most were alive.
        resident: the same between two steps.
        peak: bytes, the sum of `memory`.
        micro_batch, last_micro_batch: the work of each, and of the last one, with which the optimizer steps.
        accumulation_steps: micro-batches of a step.
        shape_flops: operations of a step by the model's shape, see scmoe_ds.models.flops.
        dtype: of the products.
        moe_layers: their number.
        host_reads: values of the GPU that DeepSpeed's engine reads in a step.
    """

    parameters: int
    memory: dict[str, int]
    resident: dict[str, int]
    peak: int
    micro_batch: Work
    last_micro_batch: Work
    accumulation_steps: int
    shape_flops: float
    dtype: torch.dtype
    moe_layers: int
    host_reads: int

    @property
    def flops(self) -> float:
        """Operations of a step."""
        return (self.accumulation_steps - 1) * self.micro_batch.flops + self.last_micro_batch.flops


def check_step(subject: Subject, loaded: LoadedConfig, place: Place) -> Findings:
    """Builds the model and the engine, and trains for two steps. The first one may add to what stays in memory.

    Raises:
        UserError: what would fail on the device.
    """
    device = torch.device("cuda", 0) if place.device == "cuda" else torch.device("cpu")
    fakes, storages = Fakes(device), Storages(device.type)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # torch and DeepSpeed look whether a tensor has memory.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for each in (
            in_one_sentence(),
            world(place.rank, place.ranks, place.per_node, device.type),
            without_memory(),
            _card(device, place, storages) if device.type == "cuda" else nullcontext(),
            even_routing(fakes),
            fakes,
            fakes.meta,
            storages,
        ):
            stack.enter_context(each)
        return train_step(subject, loaded, place, storages, fakes)


@contextmanager
def _card(device: torch.device, place: Place, storages: Storages) -> Iterator[None]:
    devices = min(place.per_node, place.ranks)
    with (
        standing_in(place.card, devices, lambda: storages.total, lambda: storages.peak),
        of_gpu(device, place.card.capability),
    ):
        yield


def train_step(
    subject: Subject, loaded: LoadedConfig, place: Place, storages: Storages, fakes: Fakes | None = None
) -> Findings:
    """What `check_step` does inside its world, where `storages` counts; without fakes in a real one."""
    check_accelerator(loaded.whole)
    loaded = loaded.in_world(place.ranks, place.tensor_parallel)
    tensor.start_tensor_parallel(place.tensor_parallel)
    replicas = tensor.data_parallel_size()
    micro_batch_size, accumulation_steps = batch_sizes(loaded.whole, replicas)
    with nullcontext() if fakes is None else building(fakes):
        model = subject.build()
    if fakes is not None:
        without_values(model, fakes)
    shortened = _settled(loaded, micro_batch_size, min(accumulation_steps, 2), replicas)
    engine, *_ = scmoe_ds.initialize(model=model, config=shortened)
    storages.rename_all(_STATE)
    storages.rename(_values_of(engine.module), _PARAMETERS)
    trainer = _trainer(subject, engine, micro_batch_size, min(accumulation_steps, 2))
    with _counted(engine, storages, place.per_node) as works:
        reads = _steps(trainer, subject, micro_batch_size, fakes, storages, works)
    units = micro_batch_size * accumulation_steps * replicas * subject.seq_length
    return Findings(
        parameters=parameters_of(engine.module, place.tensor_parallel)[2],
        memory={name: size for name, size in storages.most.items() if size},
        resident={name: size for name, size in storages.alive.items() if size},
        peak=storages.peak,
        micro_batch=works[0],
        last_micro_batch=works[-1],
        accumulation_steps=accumulation_steps,
        shape_flops=3 * forward_flops(engine.module) * units / place.ranks,
        dtype=compute_dtype(engine),
        moe_layers=len(engine.module.moe_layers()),
        host_reads=reads,
    )


def _settled(loaded: LoadedConfig, micro_batch_size: int, accumulation_steps: int, replicas: int) -> LoadedConfig:
    """The settings for a step in which no time is measured. All micro-batches of a step but its last are alike."""
    whole = copy.deepcopy(dict(loaded.whole))
    whole["gradient_accumulation_steps"] = accumulation_steps
    whole["train_batch_size"] = micro_batch_size * accumulation_steps * replicas
    section = whole["scmoe"] = dict(whole.get("scmoe", {}))
    section["overlap"] = {**section.get("overlap", {}), "calibration_steps": 0}
    if section.get("all_to_all", "auto") == "auto":
        section["all_to_all"] = "collective"
    return load(whole)


def _trainer(subject: Subject, engine: Any, micro_batch_size: int, accumulation_steps: int) -> Trainer:
    settings = TrainingSettings(
        train_iters=10**9,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        seq_length=subject.seq_length,
        seed=1,
        log_interval=10**9,
        eval_interval=10**9,
        eval_iters=0,
    )
    return subject.trainer(engine, None, None, settings, {}, iteration=1)


@contextmanager
def _counted(engine: Any, storages: Storages, per_node: int) -> Iterator[list[Work]]:
    """Has the parts of a step say what they are; yields the work of the micro-batches of the last step."""
    works: list[Work] = []
    counter = WorkCounter(per_node, lambda each: storages.rename(each, _BUFFERS, (_ACTIVATIONS, _TEMPORARIES)))
    backward, step = engine.backward, engine.step

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        storages.what_for = _TEMPORARIES
        return backward(*args, **kwargs)

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        storages.what_for = _ACTIVATIONS
        works.append(counter.take())
        return result

    engine.overlap.record(counter)
    engine.backward, engine.step = counted_backward, counted_step
    storages.what_for = _ACTIVATIONS
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda each: storages.rename([each.grad], _GRADIENTS))
    with counter:
        yield works
    del engine.backward, engine.step


def _steps(
    trainer: Trainer,
    subject: Subject,
    micro_batch_size: int,
    fakes: Fakes | None,
    storages: Storages,
    works: list[Work],
) -> int:
    """Trains for two steps, the second one with all of its micro-batches.

    Returns:
        how many values of the GPU DeepSpeed's engine has read in the last step.
    """
    batch = {
        name: torch.randint(0, 2, (micro_batch_size, *shape)).to(dtype)
        for name, (shape, dtype) in subject.sample.items()
    }
    whole, engine = trainer.settings, trainer.engine
    # Some optimizers make their states in their first step. One micro-batch is enough for it.
    for steps in (1, whole.accumulation_steps):
        trainer.settings = replace(whole, accumulation_steps=steps)
        engine.set_train_batch_size(engine.train_batch_size() // engine.gradient_accumulation_steps() * steps)
        engine.micro_steps = 0
        storages.reset()
        works.clear()
        reads = 0 if fakes is None else fakes.reads_of_engine
        trainer.step(iter([batch] * steps))
        storages.rename_all(_STATE, _TEMPORARIES)
    return 0 if fakes is None else fakes.reads_of_engine - reads


def _values_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
