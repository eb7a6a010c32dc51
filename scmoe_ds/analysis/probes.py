"""Says where a model computes its intermediate representations, and captures them with hooks during a forward pass.

They are the input of the first block and the output of each sub-layer with its residual added: 2 * blocks + 1. The norm
or module after a sub-layer reads exactly that sum, so in a pre-norm Transformer hooks on norms find it. In a post-norm
Transformer the representation is the sum after its norm, which the next sub-layer reads.

Shape suffixes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn

from scmoe_ds.errors import AnalysisError
from scmoe_ds.models.gpt import GPT

Kind = Literal["input", "attention", "mlp"]
Side = Literal["input", "output"]
Place = tuple[nn.Module, Side]

HUGGING_FACE_FAMILIES = {
    "GPT-2": ("ln_1", "attn", "ln_2"),
    "LLaMA, Mistral, Qwen": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "GPT-NeoX": ("input_layernorm", "attention", "post_attention_layernorm"),
}
"""A block's norm before the attention, its attention, and the norm before its MLP."""
_RESIDUAL_TOLERANCE = 0.02
"""Error of a residual connection's sum, relative to its largest element; bf16 rounds to 0.004."""


@dataclass(frozen=True)
class Representation:
    """One intermediate representation.

    Attributes:
        kind: "input" of the first block of a model or stage, or the output of a block's "attention" or "mlp".
        block: number of the block in its stage, from 0.
        stage: of a pyramid, from 1; 0 for a model without stages.
        is_moe: whether the "mlp" is an MoE.
    """

    kind: Kind
    block: int
    stage: int = 0
    is_moe: bool = False

    @property
    def name(self) -> str:
        """For records and figures."""
        stage = f"stage {self.stage} " if self.stage else ""
        what = {"attention": "attention", "mlp": "MoE" if self.is_moe else "MLP"}
        return f"{stage}input" if self.kind == "input" else f"{stage}block {self.block} {what[self.kind]}"


@dataclass(frozen=True)
class Probe:
    """A representation, and the modules whose first inputs or outputs add up to it (usually a single one)."""

    representation: Representation
    places: tuple[Place, ...]


class Capture(AbstractContextManager["Capture"]):
    """Hooks that keep the representations of the last forward pass.

    A module that runs twice in a pass (a norm that shortcut and backbone share) reads the same value twice; the first
    is kept. Values are copies, because a model may add to its residual stream in place.
    """

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._found: dict[tuple[int, Side], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        for module, side in dict.fromkeys(place for probe in self._probes for place in probe.places):
            hook = partial(self._keep, (id(module), side))
            if side == "input":

                def before(_: Any, args: Any, kwargs: Any, hook: Any = hook) -> None:
                    hook(args[0] if args else kwargs["hidden_states"])

                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(lambda _, args, out, hook=hook: hook(_first(out))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def _keep(self, place: tuple[int, Side], value: Tensor) -> None:
        if place not in self._found:
            self._found[place] = value.detach().clone()

    def take(self) -> list[Tensor]:
        """Returns the [..., D] of every probe since the last call, in order, and forgets them. Raises an AnalysisError
        if a module did not run."""
        values = []
        for probe in self._probes:
            parts = [
                self._found[place] for module, side in probe.places if (place := (id(module), side)) in self._found
            ]
            if len(parts) < len(probe.places):
                raise AnalysisError(
                    f"{probe.representation.name}: its module did not run in the forward pass, so "
                    "that the representation cannot be picked up"
                )
            values.append(sum(parts[1:], start=parts[0]))
        self._found.clear()
        return values


def _first(output: Any) -> Tensor:
    """The hidden states in a block's output: a tensor, or the first of a tuple (as in a PairOutput)."""
    return output[0] if isinstance(output, tuple) else output


def gpt_probes(model: GPT) -> list[Probe]:
    """Probes of this package's GPT, of any architecture."""
    blocks = [block for pair in model.runs for block in pair.blocks]
    entrances: list[tuple[nn.Module, Side]] = [
        (block.attention_norm if block.pre_norm else block.attention, "input") for block in blocks
    ]
    outputs = [*entrances[1:], (model.runs[-1], "output")]
    probes = [Probe(Representation("input", 0), (entrances[0],))]
    for number, (block, output) in enumerate(zip(blocks, outputs, strict=True)):
        attended: tuple[nn.Module, Side] = (block.mlp_norm, "input") if block.pre_norm else block.where_read("mlp")
        probes.append(Probe(Representation("attention", number), (attended,)))
        probes.append(Probe(Representation("mlp", number, is_moe=hasattr(block, "moe")), (output,)))
    return probes


def hugging_face_probes(model: nn.Module) -> list[Probe]:
    """Probes of a causal model of transformers whose modules have the names of `HUGGING_FACE_FAMILIES`.

    GPT-NeoX with `use_parallel_residual` has no norm after its attention's sum. Its representation is the sum of the
    block's input and the attention's output.

    Raises:
        AnalysisError: the blocks have other names.
    """
    blocks, (first_norm, _, second_norm) = _hugging_face_blocks(model)
    probes = [Probe(Representation("input", 0), ((blocks[0], "input"),))]
    for number, block in enumerate(blocks):
        places: tuple[tuple[nn.Module, Side], ...] = ((block.get_submodule(second_norm), "input"),)
        if getattr(block, "use_parallel_residual", False):
            added = block.get_submodule("post_attention_dropout")
            places = ((block.get_submodule(first_norm), "input"), (added, "output"))
        probes.append(Probe(Representation("attention", number), places))
        is_moe = any("expert" in name for name, _ in block.named_modules())
        probes.append(Probe(Representation("mlp", number, is_moe=is_moe), ((block, "output"),)))
    return probes


def check_hugging_face(model: nn.Module, run: Any) -> None:
    """Checks that the norm before a block's MLP reads the block's input plus its attention's output.

    Families with other residual connections use the same names: Gemma 2 normalises the attention's output alone.

    Args:
        run: a function without arguments that makes a forward pass.

    Raises:
        AnalysisError: it reads something else.
    """
    blocks, (_, attention, second_norm) = _hugging_face_blocks(model)
    if getattr(blocks[0], "use_parallel_residual", False):
        return
    unnamed = Representation("input", 0)
    places: list[tuple[nn.Module, Side]] = [
        (blocks[0], "input"),
        (blocks[0].get_submodule(attention), "output"),
        (blocks[0].get_submodule(second_norm), "input"),
    ]
    with Capture([Probe(unnamed, (place,)) for place in places]) as capture:
        run()
        before, update, after = (value.float() for value in capture.take())
    if (before + update - after).abs().max() > _RESIDUAL_TOLERANCE * after.abs().max():
        raise AnalysisError(
            f"--hf-model: {type(blocks[0]).__name__} has the module names of a known family, but {second_norm} does "
            f"not read the block's input plus the output of {attention}; its representations cannot be picked up"
        )


def _hugging_face_blocks(model: nn.Module) -> tuple[list[nn.Module], tuple[str, str, str]]:
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        for names in HUGGING_FACE_FAMILIES.values():
            if all(isinstance(getattr(block, name, None), nn.Module) for block in module for name in names):
                return list(module), names
    known = "; ".join(f"{', '.join(names)} ({family})" for family, names in HUGGING_FACE_FAMILIES.items())
    raise AnalysisError(
        f"--hf-model: {type(model).__name__} has no nn.ModuleList of blocks that hold a norm, an "
        f"attention and a norm under one of these names: {known}"
    )


def swin_probes(model: nn.Module) -> list[Probe]:
    """Probes of a SwinV2: scmoe_ds.models.swin.SwinMoE, or any model of transformers with Swinv2 stages.

    Representations of one stage have one shape. Those of different stages cannot be compared.

    Raises:
        AnalysisError: the model has no such stages.
    """
    stages = [module for module in model.modules() if type(module).__name__ == "Swinv2Stage"]
    if not stages:
        raise AnalysisError(f"{type(model).__name__} has no Swinv2Stage of transformers; only SwinV2 is known")
    probes = []
    for stage, module in enumerate(stages, start=1):
        blocks = list(module.get_submodule("blocks").children())
        probes.append(Probe(Representation("input", 0, stage), ((blocks[0], "input"),)))
        for number, block in enumerate(blocks):
            feed = block.get_submodule("intermediate")
            is_moe = any("expert" in name for name, _ in feed.named_modules())
            probes.append(Probe(Representation("attention", number, stage), ((feed, "input"),)))
            probes.append(Probe(Representation("mlp", number, stage, is_moe), ((block, "output"),)))
    return probes
