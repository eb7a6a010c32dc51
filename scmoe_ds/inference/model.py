"""A trained GPT for inference: from any checkpoint to this rank's part of it, one parameter in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.checkpoint.description import ITERATION
from scmoe_ds.checkpoint.export import open_weights
from scmoe_ds.checkpoint.parsing import DTYPES as DTYPES
from scmoe_ds.checkpoint.parsing import parse, without_memory
from scmoe_ds.checkpoint.reshard import Weights, check_parameters, own_part
from scmoe_ds.checkpoint.tokenizer_files import KEY
from scmoe_ds.config.adapt_section import same_layers
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.engine.whole_experts import prepare_whole_experts
from scmoe_ds.errors import CheckpointError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.layers import GPTSettings
from scmoe_ds.models.vision_language import gpt_of
from scmoe_ds.moe.placement import global_names, layer_of
from scmoe_ds.moe.router import correction_biases
from scmoe_ds.parallel import tensor
from scmoe_ds.parallel.groups import Layout
from scmoe_ds.planner.auto import choose_all_to_all
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.simulation import Mode


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint is of.

    Attributes:
        path: where its weights are.
        weights: the whole parameters, read one at a time.
        settings, config: of the model; the section as it was trained.
        dtype: in which it was saved or exported.
        tokenizer: its record of `scmoe_ds.checkpoint.tokenizer_files`; None: of an earlier version, or not from text.
        converted: MoE layers that ran as ScMoE when an adapted model was saved; None: all that it has.
    """

    path: Path
    weights: Weights
    settings: GPTSettings
    config: ScMoEConfig
    dtype: str
    tokenizer: Any = None
    converted: Sequence[int] | None = None

    @classmethod
    def open(cls, path: str | Path, contents: bool = True) -> TrainedModel:
        """Collective.

        Args:
            path: a checkpoint of pretrain_gpt_scmoe.py, a directory of them (its latest), or an export.
            contents: compare all files with their checksums, which reads them once; otherwise only their sizes.

        Raises:
            CheckpointError: none of these, damaged, or not a GPT.
        """
        weights, description = open_weights(Path(path), contents)
        found = parse(description, weights.path)
        if not isinstance(found.settings, GPTSettings):
            raise CheckpointError(f"{path} is not a checkpoint of a GPT; only text models can be loaded here")
        adapt, converted = found.config.adapt, None
        if adapt is not None and adapt.convert_every:
            layers = found.config.moe_layers(found.settings.num_layers)
            converted = adapt.converted_at(int(description.get(ITERATION, 0)), layers)
        tokenizer = description.get(KEY)
        return cls(weights.path, weights, found.settings, found.config, found.dtype, tokenizer, converted)


def serving_config(
    trained: ScMoEConfig, expert_parallel_size: int = 1, expert_tensor_parallelism: bool = False
) -> ScMoEConfig:
    """The section of the same function without what depends on the batch: no token is dropped, nothing is random.

    DeepSpeed's own MoE layers become the equal ones of this package, whose exchange has no padding: without drops
    DeepSpeed's buffers would be as large as the fullest expert's.

    Raises:
        ScMoEConfigError: an expert-parallel size that does not divide the number of experts.
    """
    section = trained.model_dump(mode="json")
    changes = {
        **same_layers(trained),
        "expert_parallel_size": expert_parallel_size,
        "expert_tensor_parallelism": expert_tensor_parallelism,
        "drop_tokens": False,
        "use_rts": False,
        "top2_2nd_expert_sampling": False,
        "noisy_gate_policy": None,
        "dispatch": "exact",
        "overlap": {"num_chunks": 1},
    }
    return ScMoEConfig.from_deepspeed({"scmoe": {**section, **changes}})


Offload = Callable[[GPT], None]


def load_model(
    trained: TrainedModel,
    config: ScMoEConfig,
    dtype: torch.dtype,
    device: torch.device,
    offload: Offload | None = None,
) -> GPT:
    """This rank's part of the model, in evaluation mode. Collective where experts or layers are divided.

    Args:
        trained: what to load.
        config: of `serving_config`.
        dtype: of all parameters; gates compute in fp32 whatever it is, and their biases are fp32.
        device: where they go.
        offload: is handed the model with its routed experts on the meta device, and takes them over; None: they are
            loaded like everything else.

    Raises:
        CheckpointError: weights that are missing or of another shape.
        ValueError: sizes that the tensor-parallel ranks do not divide.
    """
    group = tensor.tensor_parallel_group()
    model = without_memory(lambda: gpt_of(trained.settings, config, group=group), trained.path)
    if tensor.tensor_parallel_size() > 1 and not config.expert_tensor_parallelism:
        prepare_whole_experts(model, config)
    if dist.is_initialized() and dist.get_world_size() > 1:
        for module in model.modules():
            if isinstance(module, MoE):
                module.set_deepspeed_parallelism()
    names = global_names(model)
    check_parameters(model, trained.weights, names)
    for name, parameter in list(model.named_parameters()):
        if offload is not None and layer_of(name) is not None:
            continue
        value = own_part(trained.weights.read(names[name]), parameter, names[name])
        _put(model, name, nn.Parameter(value.to(device, dtype, copy=True), requires_grad=False))
    for name in correction_biases(model):
        _put(model, name, trained.weights.read(name).to(device, copy=True))
    if trained.converted is not None and model.conversion.numbers:
        model.conversion.only(trained.converted)
    if offload is not None:
        offload(model)
    return model.eval()


def calibrators(model: GPT, config: ScMoEConfig, layout: Layout, sequences: int, prompt: int) -> dict[Mode, Calibrator]:
    """Schedules and all-to-all of prefill and decode, each from the first of its own passes. Collective over the world.

    Args:
        sequences, prompt: of a batch on each rank, and tokens of each prompt, about.
    """
    tokens: dict[Mode, int] = {"prefill": sequences * prompt, "decode": sequences}
    found, device = {}, model.embedding.weight.device
    for mode, number in tokens.items():
        transport = choose_all_to_all(model, config.all_to_all, layout, number, mode)
        found[mode] = Calibrator(model.scheduled_pairs(), config.overlap, device, mode, transport=transport)
    return found


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
