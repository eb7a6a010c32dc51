"""Routed experts that are trained out of the device's memory: weights come in the shortcut's window, gradients leave.

The gate of a ScMoE knows a layer's experts a window before they run, so that their weights come exactly. In the
backward pass they are asked for again when the gradient of the layer's output is there, which is a window before the
experts' own backward pass. In between they need no memory of the device.

Shape suffixes: S rows received, D hidden, F feed-forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scmoe_ds.moe.experts import MovingExperts, has_linear_projections
from scmoe_ds.moe.linear_experts import product
from scmoe_ds.moe.placement import own_first_expert
from scmoe_ds.offload.own_checkpoints import LOAD_STATE_DICT
from scmoe_ds.offload.shape import ExpertShape, Part
from scmoe_ds.offload.states import ExpertStates
from scmoe_ds.offload.store import ExpertKey, ExpertStore

STAND_IN = "stand_in"
"""Begins the names of parameters that no checkpoint has."""


class TrainableExperts(MovingExperts):
    """Takes the place of a layer's experts of two linear projections; see scmoe_ds.moe.experts.MovingExperts.

    Its own parameters are of one element and stay 0. They stand for the experts in DeepSpeed's optimizer groups, so
    that learning rates, schedules and weight decay reach these.

    Args:
        store, states: of all layers.
        layer: MoE layer of this model, from 0.
        num_local_experts: of this rank.
        activate: [rows, F or 2F] → [rows, F], element by element.
        group_name: of DeepSpeed's expert-parallel groups.

    Attributes:
        in_state_dict: whether a state dict has the experts; a checkpoint has them in files of their own.
    """

    def __init__(
        self,
        store: ExpertStore,
        states: ExpertStates,
        layer: int,
        num_local_experts: int,
        activate: Callable[[Tensor], Tensor],
        group_name: str | None,
    ) -> None:
        super().__init__()
        self.store, self.states, self.layer, self.activate = store, states, layer, activate
        self.num_local_experts, self.group_name = num_local_experts, group_name
        for group in states.shape.groups:
            stand_in = nn.Parameter(torch.zeros([1] * (2 - group)))
            stand_in.allreduce, stand_in.group_name = False, group_name  # type: ignore[attr-defined]
            self.register_parameter(f"{STAND_IN}_{group}", stand_in)
        self.in_state_dict = True
        self._passing: list[ExpertKey] = []  # of the forward pass whose output is not collected yet
        self._recalled: Counter[ExpertKey] = Counter()

    @property
    def stand_ins(self) -> dict[int, nn.Parameter]:
        """The parameter that stands for each group of `ExpertShape`."""
        return {group: self.get_parameter(f"{STAND_IN}_{group}") for group in self.states.shape.groups}

    def members(self) -> list[ExpertKey]:
        """Of all experts."""
        return [ExpertKey(self.layer, expert) for expert in range(self.num_local_experts)]

    def announce(self, rows_per_expert: Sequence[int]) -> None:
        """Asks for the experts that have rows."""
        self.states.gather(self.layer)
        self.store.fetch(self._needed(rows_per_expert))

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """[S, D] → [S, D]: each needed expert on its own rows."""
        self._passing += self._needed(rows_per_expert)
        parameters = self.stand_ins.values()
        return _Experts.apply(self, list(rows_per_expert), rows_SD, *parameters)

    def collected(self, output_TD: Tensor) -> Tensor:
        """The layer's output, whose gradient asks for the experts again."""
        keys, self._passing = self._passing, []
        if output_TD.requires_grad:
            output_TD.register_hook(lambda _: self._recall(keys))
        return output_TD

    def _needed(self, rows_per_expert: Sequence[int]) -> list[ExpertKey]:
        return [key for key, rows in zip(self.members(), rows_per_expert, strict=True) if rows]

    def _recall(self, keys: Sequence[ExpertKey]) -> None:
        self._recalled.update(keys)
        self.store.fetch(keys)

    def take_back(self, key: ExpertKey) -> dict[str, Tensor]:
        """The weights for the backward pass. Give them back with `store.release`."""
        if self._recalled[key]:
            self._recalled[key] -= 1
        else:  # nothing of the layer's output has a gradient of its own, as in a recomputation
            self.store.fetch([key])
        return self.take(key)

    def take(self, key: ExpertKey) -> dict[str, Tensor]:
        """The weights that were asked for."""
        return self.states.shape.views(self.store.take(key).get_parameter("flat"))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The weights, on the CPU, under the names that experts in memory have."""
        for key in self.members() if self.in_state_dict else ():
            for name, value in self.states.weights(key).items():
                destination[f"{prefix}deepspeed_experts.{key.expert}.{name}"] = value

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """A state dict has neither the fp32 weights nor the moments that the next step needs."""
        *_, errors = arguments
        errors.append(LOAD_STATE_DICT)


class Slot(nn.Module):
    """Memory for one expert's weights on the device, for an `ExpertStore`."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__()
        self.flat = nn.Parameter(flat, requires_grad=False)


class _Experts(torch.autograd.Function):
    """The products and their gradients are those that autograd makes of an expert in memory, in that order."""

    @staticmethod
    def forward(ctx: Any, experts: TrainableExperts, counts: list[int], rows_SD: Tensor, *stand_ins: Tensor) -> Tensor:
        output_SD = torch.empty_like(rows_SD)
        ctx.experts, ctx.counts = experts, counts
        inner: list[Tensor] = []
        for key, rows, output in _parts(experts, counts, rows_SD, output_SD):
            weights = experts.take(key)
            inner.append(_product(rows, weights, "input"))
            _product(experts.activate(inner[-1]), weights, "output", output)
            experts.store.release(key)
        ctx.save_for_backward(rows_SD, *inner, *stand_ins)
        return output_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        experts, shape = ctx.experts, ctx.experts.states.shape
        rows_SD, *inner = ctx.saved_tensors
        stand_ins = [inner.pop() for _ in ctx.needs_input_grad[3:]][::-1]
        grad_SD = torch.empty_like(rows_SD) if ctx.needs_input_grad[2] else None
        parts = _parts(experts, ctx.counts, rows_SD, grads[0].contiguous(), grad_SD if grad_SD is not None else rows_SD)
        for (key, rows, grad, grad_rows), inner_SF in zip(parts, inner, strict=True):
            with torch.enable_grad():
                inner_SF = inner_SF.detach().requires_grad_()
                activated_SF = experts.activate(inner_SF)
            buffer = experts.states.gradient_buffer()
            found, weights = shape.views(buffer), experts.take_back(key)
            _gradient(grad, activated_SF.detach(), found, "output")
            (grad_SF,) = torch.autograd.grad(activated_SF, inner_SF, grad @ weights["output.weight"])
            _gradient(grad_SF, rows, found, "input")
            if grad_SD is not None:
                torch.mm(grad_SF, weights["input.weight"], out=grad_rows)
            experts.store.release(key)
            experts.states.keep(key, buffer)
        return None, None, grad_SD, *(torch.zeros_like(each) for each in stand_ins)


def _parts(experts: TrainableExperts, counts: list[int], *tensors: Tensor) -> list[tuple[Any, ...]]:
    """Of each expert with rows: its key, and its rows of each tensor."""
    split = zip(experts.members(), *(tensor.split(counts) for tensor in tensors), strict=True)
    return [each for each, rows in zip(split, counts, strict=True) if rows]


def _product(rows: Tensor, weights: dict[str, Tensor], layer: str, out: Tensor | None = None) -> Tensor:
    return product(rows, weights[f"{layer}.weight"], weights.get(f"{layer}.bias"), out)


def _gradient(grad: Tensor, rows: Tensor, into: dict[str, Tensor], layer: str) -> None:
    torch.mm(grad.t(), rows, out=into[f"{layer}.weight"])
    if f"{layer}.bias" in into:
        torch.sum(grad, 0, out=into[f"{layer}.bias"])


def shape_of(expert: nn.Module) -> ExpertShape | None:
    """The shape of an expert of two projections; None: it is of another form, hooked, or not wholly trained."""
    names = {f"{layer}.{part}" for layer in ("input", "output") for part in ("weight", "bias")}
    found = dict(expert.named_parameters())
    whole = all(parameter.requires_grad for parameter in found.values()) and not any(True for _ in expert.buffers())
    return ExpertShape.of(expert) if has_linear_projections(expert) and whole and found.keys() <= names else None


def offloaded(model: nn.Module) -> list[TrainableExperts]:
    """The offloaded experts of each MoE layer; empty where experts are in memory."""
    return [module for module in model.modules() if isinstance(module, TrainableExperts)]


def gather_experts(model: nn.Module) -> None:
    """The weights of all offloaded experts are those of their last step on this rank, as after a forward pass; state
    dicts need that. Collective."""
    for each in offloaded(model):
        each.states.gather(each.layer)


@contextmanager
def left_out_of_state_dicts(model: nn.Module) -> Iterator[None]:
    """Within the block a model's state dict lacks its offloaded experts."""
    found = offloaded(model)
    try:
        for each in found:
            each.in_state_dict = False
        yield
    finally:
        for each in found:
            each.in_state_dict = True


def offloaded_names(model: nn.Module) -> dict[str, tuple[TrainableExperts, ExpertKey, Part]]:
    """The global name of each parameter of an offloaded expert: where it is."""
    return {
        f"{name}.deepspeed_moe.experts.deepspeed_experts.{own_first_expert(layer) + key.expert}.{part.name}": (
            layer.deepspeed_moe.experts,
            key,
            part,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, MoE) and isinstance(layer.deepspeed_moe.experts, TrainableExperts)
        for key in layer.deepspeed_moe.experts.members()
        for part in layer.deepspeed_moe.experts.states.shape.parts
    }


def write_experts(
    model: nn.Module,
    states_of: Callable[[str, Part], Mapping[str, Tensor]],
    steps_of: Callable[[str], float] = lambda name: 0.0,
) -> None:
    """Sets all offloaded experts of a model, one after another. Steps and gradients from before are over.

    Args:
        states_of: the fp32 weights and Adam's moments of a parameter, by its global name; the weights are rounded to
            the parameters' dtype by nobody.
        steps_of: how many steps of the optimizer they are from; without any there are no moments.
    """
    of_all = offloaded(model)[:1]
    for each in of_all:
        each.states.forget_gradients()
    for (experts, key), names in by_expert(offloaded_names(model)).items():
        steps = steps_of(next(iter(names)))
        experts.states.write(key, {part.name: states_of(name, part) for name, part in names.items()}, steps)
    for each in of_all:
        each.store.renew(each.states.keys)


def by_expert(
    named: Mapping[str, tuple[TrainableExperts, ExpertKey, Part]],
) -> dict[tuple[TrainableExperts, ExpertKey], dict[str, Part]]:
    """The parameters of `offloaded_names`, expert by expert."""
    found: dict[tuple[TrainableExperts, ExpertKey], dict[str, Part]] = {}
    for name, (experts, key, part) in named.items():
        found.setdefault((experts, key), {})[name] = part
    return found
