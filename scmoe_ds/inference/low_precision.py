"""Low precision for the routed experts of a loaded model: which layers take it, and what it was used for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe_ds.errors import ArgumentError
from scmoe_ds.inference.attachment import LOW_PRECISION, Attachment, Place, check, moe_layers, place_of_experts
from scmoe_ds.moe.decisions.low_precision import LowPrecision, LowPrecisionContainer, LowPrecisionExperts
from scmoe_ds.moe.decisions.low_precision_expert import of_grouped
from scmoe_ds.moe.decisions.low_precision_formats import FORMATS, Format, formats_of
from scmoe_ds.moe.experts import is_plain
from scmoe_ds.moe.grouped import GroupedRows
from scmoe_ds.moe.layer import StagedMoE


class Attached(Attachment):
    """Of one model on this rank.

    Attributes:
        format: that hot ranks compute in.
        layers: the experts of each MoE layer, in the model's order.
    """

    def __init__(self, format: str, layers: Sequence[LowPrecisionExperts], places: Sequence[Place]) -> None:
        self.format, self.layers = format, layers
        super().__init__(places)

    def attach(self) -> None:
        """Puts it there again. The weights may be others than before."""
        super().attach()
        for each in self.layers:
            each.forget_scales()

    def summary(self) -> str:
        """One line on all ranks of the world. Collective."""
        counts = [each.counts for each in self.layers]
        own = sum(each.hot for each in counts), sum(each.passes for each in counts)
        found: list[tuple[int, int]] = [own] * dist.get_world_size()
        dist.all_gather_object(found, own)
        hot = ", ".join(f"rank {rank} in {hot}" for rank, (hot, _) in enumerate(found) if hot) or "none"
        return f"low precision ({self.format}): hot ranks, of {own[1]} layer passes: {hot}"


def use_low_precision(model: nn.Module, settings: LowPrecision) -> Attached:
    """From now on, ranks that `settings` calls hot compute their routed experts in low precision.

    Weights may change in place, by training, or while it is detached. After weights were replaced by other tensors, or
    written through `data` between two passes without gradients (such as an average of weights that is swapped in),
    attach it anew: detach(), then this function.

    Args:
        model: a GPT of this package, or a Hugging Face model whose MoE layers `scmoe_ds.initialize` has attached, on
            its device.
        settings: which ranks, and when.

    Returns:
        a handle: `summary()` says how often each rank was hot.

    Raises:
        ArgumentError: a device without the format, or experts that cannot be computed so.
    """
    layers = moe_layers(model)
    if not layers:
        raise ArgumentError(
            f"low precision: {type(model).__name__} has no MoE layer of this package; load a model with routed experts"
        )
    device = next(model.parameters()).device
    format = choose_format(settings.format, device)
    check(list(layers.values()), [LOW_PRECISION], "low precision")
    for name, layer in layers.items():
        _check(name, layer, settings, format)
    experts = [_experts(layer, settings, format) for layer in layers.values()]
    places = [(*place_of_experts(layer), own) for layer, own in zip(layers.values(), experts, strict=True)]
    return Attached(format.name, experts, places)


def choose_format(name: str | None, device: torch.device) -> Format:
    """The format of this name; None: the best of the device.

    Raises:
        ArgumentError: the device does not have it.
    """
    has = formats_of(device)
    if not has:
        raise ArgumentError(
            f"low precision: {_name_of(device)} has neither int8 nor fp8 products that torch can use (a CPU, or an "
            "NVIDIA GPU of compute capability 8.0 and above has); leave low precision off"
        )
    if name is None:
        return has[0]
    if name not in FORMATS:
        raise ArgumentError(f"format = {name!r}: must be one of {', '.join(FORMATS)}")
    if FORMATS[name] not in has:
        names = " and ".join(each.name for each in has)
        raise ArgumentError(f"format = {name}: {_name_of(device)} has {names}; use that")
    return FORMATS[name]


def _name_of(device: torch.device) -> str:
    if device.type != "cuda":
        return f"device {device.type}"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.get_device_name(device)} (compute capability {capability})"


def _check(name: str, layer: Any, settings: LowPrecision, format: Format) -> None:
    """Raises an ArgumentError for experts that cannot be computed in low precision."""
    if isinstance(layer, StagedMoE):
        experts = layer.deepspeed_moe.experts
        if not all(map(is_plain, experts.deepspeed_experts)):
            raise ArgumentError(
                f"low precision: an expert of {name} is watched by a hook, or not of two "
                "projections; leave low precision off"
            )
        weights = [weight for weight in experts.parameters() if weight.dim() == 2]
    else:
        if settings.score is None:
            raise ArgumentError(f"score = None: AutoEP's {name} has no marks of tokens; give a score from 0 to 1")
        if hasattr(layer.experts.w1, "ds_id"):
            raise ArgumentError(f"low precision: the experts of {name} are divided by ZeRO-3; load them whole")
        weights = [layer.experts.w1, layer.experts.w3, layer.experts.w2]
    _check_sizes(name, weights, format)


def _check_sizes(name: str, weights: Sequence[Tensor], format: Format) -> None:
    for weight in weights:
        if weight.is_cuda and any(size % format.multiple for size in weight.shape[-2:]):
            sizes = " × ".join(map(str, weight.shape[-2:]))
            raise ArgumentError(
                f"low precision: a projection of {name} has {sizes} weights, {format.name} needs multiples of "
                f"{format.multiple} on a GPU; leave low precision off"
            )


def _experts(layer: Any, settings: LowPrecision, format: Format) -> LowPrecisionExperts:
    if isinstance(layer, StagedMoE):
        return LowPrecisionContainer(layer.deepspeed_moe.experts, layer.slices, settings, format)
    usual = GroupedRows(layer.experts).run
    return LowPrecisionExperts(of_grouped(layer.experts), usual, layer.slices, settings, format)
