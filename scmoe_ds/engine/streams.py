"""The residual stream behind each MoE layer of a model, for a loss on what the layers put out.

The place is behind the block of the layer. With a late join it is behind the next block's attention, where the routed
output has joined; the source is read at the same place, so that both have done the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.replace.calls import first_hidden
from scmoe_ds.replace.taps import POST_ATTENTION_NORMS, blocks_around


class _Place(NamedTuple):
    module: nn.Module
    side: Literal["input", "output"]


class Streams:
    """Hooks that keep the streams of a pass.

    Args:
        model: a GPT of this package, or a model with AutoEP layers under schedules.
        section: its join says where.

    Raises:
        ScMoEConfigError: a model with a late join whose blocks have no norm behind the attention.
    """

    def __init__(self, model: nn.Module, section: ScMoEConfig) -> None:
        places = _of_gpt(model, section) if isinstance(model, GPT) else _of_autoep(model, section)
        self._kept: list[Tensor | None] | None = None
        for number, place in enumerate(places):
            if place.side == "input":
                place.module.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            else:
                place.module.register_forward_hook(partial(self._after, number))
        self._count = len(places)

    def begin(self) -> None:
        """The next pass is kept."""
        self._kept = [None] * self._count

    def take(self) -> list[Tensor]:
        """[B, S, D] behind each MoE layer, in order; the pass is over.

        Raises:
            ScMoEConfigError: activation checkpointing hides the streams' gradients.
        """
        kept, self._kept = self._kept, None
        streams = [stream for stream in kept or () if stream is not None]
        assert len(streams) == self._count, "a pass that has begun keeps every stream"
        if torch.is_grad_enabled() and not all(stream.requires_grad for stream in streams):
            raise ScMoEConfigError(
                "scmoe.adapt.distill.gamma: reentrant activation checkpointing hides the gradients of MoE blocks' "
                'outputs; use gradient_checkpointing_kwargs={"use_reentrant": False}, or set gamma to 0'
            )
        return streams

    def _before(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(number, first_hidden(args, kwargs))

    def _after(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._keep(number, first_hidden((output,), {}))

    def _keep(self, number: int, stream: Tensor | None) -> None:
        """The first one: the same norm may be called for a shortcut, and activation checkpointing repeats blocks."""
        if self._kept is not None and self._kept[number] is None:
            self._kept[number] = stream


def _of_gpt(model: GPT, section: ScMoEConfig) -> list[_Place]:
    places = [_Place(pair, "output") for pair in model.runs]
    if section.join == "late":
        for number, following in enumerate(model.runs[1:]):
            places[number] = _Place(following.blocks[0].mlp_norm, "input")
    return places


def _of_autoep(model: nn.Module, section: ScMoEConfig) -> list[_Place]:
    from scmoe_ds.replace.autoep import autoep_layers  # AutoEP may be missing in this DeepSpeed

    places = []
    for name, _ in autoep_layers(model):
        blocks = blocks_around(model, name)
        number = next(number for number, block in enumerate(blocks) if f"{name}.".startswith(f"{block}."))
        block = model.get_submodule(blocks[number])
        if section.join == "late" and number + 1 < len(blocks):
            following = model.get_submodule(blocks[number + 1])
            norm = next((getattr(following, each) for each in POST_ATTENTION_NORMS if hasattr(following, each)), None)
            if norm is None:
                raise ScMoEConfigError(
                    f"scmoe.adapt.distill.gamma: {blocks[number + 1]} has no norm behind its attention, where the "
                    'stream behind the join could be read; set scmoe.join to "end", or gamma to 0'
                )
            places.append(_Place(norm, "input"))
        else:
            places.append(_Place(block, "output"))
    return places
