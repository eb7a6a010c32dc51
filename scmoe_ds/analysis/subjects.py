"""Models for an analysis: their probes, their forward pass and their MoE layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scmoe_ds.analysis.probes import Probe, check_hugging_face, gpt_probes, hugging_face_probes, swin_probes
from scmoe_ds.errors import AnalysisError, one_line
from scmoe_ds.inference.model import DTYPES
from scmoe_ds.models.gpt import GPT


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode.

    Attributes:
        probes: where its representations are.
        run: a forward pass without a language model's logits, over a batch on its device.
        device: of its parameters.
        moe_blocks: (stage, block) of every MoE layer; in a dense model, of every block that would have an MoE.
        distance: blocks between a shortcut's tap and its MoE.
        trained: position of the shortcut that all MoE layers were trained with; None if there is no common one.
        check: raises an AnalysisError if a batch shows that the probes read something else.
        context: most tokens of a sequence; None for images.
        vocab_size: token ids are below it; 0 for images.
    """

    probes: list[Probe]
    run: Callable[[Tensor], object]
    device: torch.device
    moe_blocks: list[tuple[int, int]]
    distance: int = 1
    check: Callable[[Tensor], None] = lambda batch: None
    context: int | None = None
    vocab_size: int = 0
    trained: str | None = None


def moe_blocks(num_blocks: int, moe_every: int) -> list[tuple[int, int]]:
    """The last of every `moe_every` blocks. Raises an AnalysisError if there are fewer blocks."""
    found = [(0, block) for block in range(moe_every - 1, num_blocks, moe_every)]
    if not found:
        raise AnalysisError(f"--moe-every {moe_every}: the model has {num_blocks} blocks; give at most that")
    return found


def gpt_subject(model: GPT, moe_every: int | None = None) -> Subject:
    """This package's GPT.

    Args:
        moe_every: analyses another frequency of MoE layers than the model's.
    """
    settings, config = model.settings, model.config
    blocks = moe_blocks(settings.num_layers, moe_every or config.moe_every)
    everywhere = all(pair.running.config.has_shortcut for pair in model.scheduled_pairs())
    is_trained = config.has_shortcut and everywhere and config.first_layer_position in (None, config.position)
    return Subject(
        gpt_probes(model),
        model.hidden_states,
        model.embedding.weight.device,
        blocks,
        config.shortcut_distance,
        context=settings.max_position_embeddings,
        vocab_size=settings.vocab_size,
        trained=config.position if is_trained else None,
    )


def hugging_face_subject(model: Any, moe_every: int | None = None) -> Subject:
    """A causal language model of transformers.

    Args:
        moe_every: analyses this frequency of MoE layers. None takes the model's MoE layers, or in a dense model every
            second block.

    Raises:
        AnalysisError: the family is unknown.
    """
    probes = hugging_face_probes(model)
    model.eval()

    def run(tokens: Tensor) -> object:
        return model.base_model(tokens, use_cache=False)

    weight = model.get_input_embeddings().weight
    context = getattr(model.config, "max_position_embeddings", None)
    found = [(0, probe.representation.block) for probe in probes if probe.representation.is_moe]
    blocks = found if found and moe_every is None else moe_blocks(len(probes) // 2, moe_every or 2)
    return Subject(
        probes,
        run,
        weight.device,
        blocks,
        check=lambda batch: check_hugging_face(model, lambda: run(batch)),
        context=context,
        vocab_size=weight.shape[0],
    )


def swin_subject(model: nn.Module) -> Subject:
    """A SwinV2 of this package or of transformers; batches are images [B, C, S, S].

    The MoE layers of a dense SwinV2 would be in every second block of stages 3 and 4, as in scmoe_ds.models.swin.
    """
    probes = swin_probes(model)
    model.eval()
    outputs = [probe.representation for probe in probes if probe.representation.kind == "mlp"]
    found = [(each.stage, each.block) for each in outputs if each.is_moe]
    blocks = found or [(each.stage, each.block) for each in outputs if each.stage > 2 and each.block % 2]
    return Subject(probes, model, next(model.parameters()).device, blocks)


def open_hugging_face(directory: str, dtype: str | None, device: torch.device) -> Any:
    """A causal model from a local directory; nothing is downloaded. Raises an AnalysisError if the directory is
    missing, or transformers cannot load it."""
    local_directory(directory)
    from transformers import AutoModelForCausalLM

    model = load_hugging_face(AutoModelForCausalLM, directory, "a causal language model")
    return model.to(device=device, dtype=DTYPES[dtype] if dtype else None).eval()


def load_hugging_face(kind: Any, directory: str, what: str) -> Any:
    """A model of a class of transformers; no code that the directory brings along is run. Raises an AnalysisError if it
    does not load."""
    try:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... by file
        raise AnalysisError(f"--hf-model {directory} does not load as {what}: {one_line(error, 300)}") from None


def local_directory(directory: str) -> Path:
    """Raises an AnalysisError if --hf-model is no local directory."""
    if not Path(directory).is_dir():
        raise AnalysisError(
            f"--hf-model {directory} is not a local directory; save the model with transformers' "
            "save_pretrained and give that directory: names on a hub are not downloaded"
        )
    return Path(directory)
