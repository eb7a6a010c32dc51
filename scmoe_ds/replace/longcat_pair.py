"""LongCat-Flash's decoder layer as a pair: transformers' own modules, in the order of transformers' own forward.

    attention, norm │ tap │ mlp, attention, mlp │ join       the routed experts and the first MLP read the same norm

Every layer is a ScMoE by design. The window is long: two MLPs and an attention. The mathematics is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashDecoderLayer

from scmoe_ds.config.overlap_section import OverlapConfig
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.overlap import executor
from scmoe_ds.overlap.executor import Activations, Operator, PairOutput, Step, numbered
from scmoe_ds.overlap.schedule import Schedule
from scmoe_ds.replace.as_is import AsIsPair
from scmoe_ds.replace.recomputation import is_repeated
from scmoe_ds.trace.recorder import SILENT, PairRecorder

_SIGNATURE = signature(LongcatFlashDecoderLayer.forward)
_TAP = 1
"""Operators before the tap."""


class LongCatPair(AsIsPair):
    """A decoder layer; `operators()` and `facts()` are for reading, `run` makes a pass.

    Args:
        block: the decoder layer, whose `mlp` is the routed experts' layer.
        overlap: the section's "overlap".
    """

    def __init__(self, block: Any, overlap: OverlapConfig) -> None:
        self.block = block
        super().__init__(block.mlp, overlap)

    def operators(self, call: Mapping[str, Any] | None = None) -> list[Operator]:
        """All operators; `call` holds what the attentions are called with, beside the hidden states."""
        steps: list[tuple[str, Step]] = []
        for number in range(2):
            steps += [
                ("attention", partial(self._attend, number, call or {})),
                ("mlp", partial(self._feed, number)),
            ]
        return numbered(steps, _TAP)

    def costs(self) -> list[float]:
        """Of the backbone's operators: parameters, which are what a token is multiplied with."""
        block = self.block
        return [float(_size(each)) for each in (block.mlps[0], block.self_attn[1], block.mlps[1])]

    def facts(self) -> dict[str, Any]:
        heads = self.block.self_attn[0].num_heads
        labels = [each.label for each in executor.backbone(self)]
        return {"operators": labels, "attention_heads": heads, "parameters": _size(self.block)}

    def run(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """[B, S, D] → the same, under the schedule of the pass that begins now."""
        recorder = SILENT if is_repeated() else self.recorder
        return executor.run(_Pass(self, call), hidden, self.schedule_now(), recorder).hidden

    def begin(
        self, activations: Activations, used_token: Tensor | None, schedule: Schedule, recorder: PairRecorder
    ) -> Any:
        """Router, encode, dispatch in flight."""
        assert activations.moe_input is not None
        return super().begin(activations._replace(hidden=activations.moe_input), used_token, schedule, recorder)

    def join(self, routed: Any, activations: Activations) -> PairOutput:
        """Waits for the combine, and adds the result."""
        output = super().join(routed, activations)
        return output._replace(hidden=activations.hidden + output.hidden)

    def _attend(self, number: int, call: Mapping[str, Any], activations: Activations) -> Activations:
        """An attention, and the norm behind it."""
        block, hidden = self.block, activations.hidden
        attended, _ = block.self_attn[number](hidden_states=block.input_layernorm[number](hidden), **call)
        hidden = hidden + attended
        return activations._replace(hidden=hidden, moe_input=block.post_attention_layernorm[number](hidden))

    def _feed(self, number: int, activations: Activations) -> Activations:
        output = self.block.mlps[number](activations.moe_input)
        return activations._replace(hidden=activations.hidden + output, moe_input=None)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of a pair: the executor's view of it."""

    pair: LongCatPair
    call: Mapping[str, Any]

    def operators(self) -> list[Operator]:
        return self.pair.operators(self.call)

    def begin(self, *args: Any) -> Any:
        return self.pair.begin(*args)

    def join(self, routed: Any, activations: Activations) -> PairOutput:
        return self.pair.join(routed, activations)


class ScheduledLongCatLayer(LongcatFlashDecoderLayer):
    """A decoder layer that runs as its MoE's pair; see `schedule_blocks`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own, whatever its version hands on to the attentions."""
        bound = _SIGNATURE.bind(self, hidden_states, *args, **kwargs)
        bound.apply_defaults()
        call = dict(bound.arguments)
        del call["self"]
        hidden, more = call.pop("hidden_states"), call.pop("kwargs", {})
        return self.mlp.base.run(hidden, {**call, **more})


def schedule_blocks(model: nn.Module, section: ScMoEConfig) -> None:
    """Changes the class of every decoder layer, in place, and gives its MoE layer the pair that runs both.

    Raises:
        ScMoEConfigError: another shortcut than the model's own.
    """
    if section.architecture != "as_is":
        raise ScMoEConfigError(
            f'scmoe.architecture = "{section.architecture}": every layer of LongCat-Flash has a shortcut already; use '
            '"as_is", or remove the field'
        )
    for block in model.modules():
        if isinstance(block, LongcatFlashDecoderLayer):
            block.__class__ = ScheduledLongCatLayer
            block.mlp.base = LongCatPair(block, section.overlap)


def _size(module: nn.Module) -> int:
    return sum(getattr(each, "ds_numel", each.numel()) for each in module.parameters())
