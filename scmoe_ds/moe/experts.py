"""Expert computation on rows without padding, and an initialisation that does not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scmoe_ds.compat import forward_hooks
from scmoe_ds.moe.kernels import GroupedProduct, kernels_of
from scmoe_ds.moe.linear_experts import linear_experts

Project = Callable[[Tensor], Tensor]


class TwoProjections(Protocol):
    """An expert that computes output(activate(input(x))), and says that the three may be called by themselves.

    Not for isinstance: from Python 3.12 on that does not find a module's submodules.
    """

    two_projections: bool
    input: nn.Linear
    output: nn.Linear

    def activate(self, inner: Tensor) -> Tensor:
        """[rows, F or 2F] → [rows, F], element by element."""


class HasMembers(Protocol):
    """A container of experts, as DeepSpeed's."""

    @property
    def deepspeed_experts(self) -> Iterable[Any]:
        """Its members."""


class OwnExperts:
    """Experts that compute by themselves, in the place of DeepSpeed's container: AutoEP's (moe/grouped.py), those that
    compute by halves or in low precision (moe/decisions/), and those whose weights arrive when needed (offload/).

    In a pass a layer calls `notice` and `told` if there are `notices`, then `announce` for each chunk, then `run` for
    each chunk, and at last `collected`.
    """

    num_local_experts: int

    notices: int = 0
    """How many numbers every rank tells every other one beside its row counts; see `notice`."""

    def notice(self, routing: Any, ranks: int) -> Tensor:
        """What this rank tells each rank of its routing: [ranks, notices] int64 on the tokens' device.

        Args:
            routing: a moe.gate.Routing.
            ranks: of the exchange.
        """
        raise NotImplementedError

    def told(self, told_PX: Tensor) -> None:
        """Hears what every rank has told this one, [ranks, notices] int64 on the host; once per routing."""

    def announce(self, rows_per_expert: Sequence[int]) -> None:
        """Hears how many rows each local expert will get in a `run`, as soon as the host knows that."""

    def run(self, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
        """[S, D] → [S, D], as `run_experts`."""
        raise NotImplementedError

    def collected(self, output_TD: Tensor) -> Tensor:
        """Is handed the layer's routed output, [T, D], and returns it. In the backward pass the gradient of this output
        is there a window before those of the `run`s: experts that are offloaded in training are asked for then."""
        return output_TD


class MovingExperts(nn.Module, OwnExperts):
    """Experts whose weights arrive when needed; see scmoe_ds.inference.offload."""

    num_local_experts: int


def run_experts(experts: Experts | OwnExperts, rows_SD: Tensor, rows_per_expert: Sequence[int]) -> Tensor:
    """Each local expert on its own rows.

    Args:
        experts: DeepSpeed's container, or experts in its place. An expert maps [rows, D] to [rows, D], or to a tuple
            that starts with it: Megatron's MLP also returns its bias, which DeepSpeed ignores too.
        rows_SD: rows in expert order.
        rows_per_expert: rows of each; may be zero, the expert's gradients are then zeros.

    Returns:
        [S, D] in the same order.
    """
    if isinstance(experts, OwnExperts):
        return experts.run(rows_SD, rows_per_expert)
    members = list(experts.deepspeed_experts)
    if product := product_for(experts, rows_SD):
        return grouped_experts(experts, rows_SD, rows_per_expert, product)
    if rows_SD.is_cuda and all(is_linear(expert, rows_SD) for expert in members):
        layers = [expert.input for expert in members], [expert.output for expert in members]
        return linear_experts(members[0].activate, *layers, rows_SD, rows_per_expert)
    outputs = []
    for expert, part in zip(members, rows_SD.split(list(rows_per_expert)), strict=True):
        output = activate_and_project(expert, expert.input(part)) if is_plain(expert) else expert(part)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def is_plain(expert: nn.Module) -> bool:
    """Whether an expert is of the form of `TwoProjections` with nothing hooked into its forward pass."""
    hooked = any(forward_hooks(expert))
    return not hooked and has_two_projections(expert)


def is_linear(expert: nn.Module, rows: Tensor) -> bool:
    """Whether the two projections are no more than products with weights of the rows' dtype."""
    if torch.is_autocast_enabled(rows.device.type) or not has_linear_projections(expert):
        return False
    return all(parameter.dtype == rows.dtype for parameter in expert.parameters())


def has_linear_projections(expert: nn.Module) -> bool:
    """Whether the two projections are no more than linear layers: no hooks, no adapter."""
    if not is_plain(expert):
        return False
    return all(type(each) is nn.Linear and not any(forward_hooks(each)) for each in (expert.input, expert.output))


def has_two_projections(expert: nn.Module) -> bool:
    """Whether an expert says that it is of the form of `TwoProjections`."""
    return getattr(expert, "two_projections", False) is True


def activate_and_project(expert: TwoProjections, inner: Tensor, project: Project | None = None) -> Tensor:
    """output(activate(inner)); for the backward pass only `inner` is kept.

    The activated rows are as large as the expert's widest tensor. When the gradient needs them, they are computed
    again: one pass over `inner` and no matrix product, since the checkpoint stops before the product.
    """
    project = project or expert.output
    if not torch.is_grad_enabled():
        return project(expert.activate(inner))
    return checkpoint(lambda rows: project(expert.activate(rows)), inner, use_reentrant=False, preserve_rng_state=False)


def product_for(experts: Experts, rows_SD: Tensor) -> GroupedProduct | None:
    """The grouped matrix product of a device, for linear experts whose rows have a multiple of 16 bytes.

    Not for one or two: two products take less than one grouped product with the copy of the weights that it needs. Nor
    where a rank has got no rows at all, as happens when single tokens are decoded: no kernel need know that.
    """
    product = kernels_of(rows_SD).grouped_product if rows_SD.shape[0] else None
    members = list(experts.deepspeed_experts)
    fits = product is not None and len(members) > 2 and all(is_linear(expert, rows_SD) for expert in members)
    return product if fits and all(parameter.shape[-1] % 8 == 0 for parameter in experts.parameters()) else None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device. From pageable memory the host would wait for all earlier work of the GPU.

    A tensor may be on another device, or on this one under `torch.set_default_device`; such memory cannot be pinned.
    """
    pinned = tensor.device.type == "cpu" and device.type == "cuda"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=pinned)


def grouped_experts(
    experts: HasMembers, rows_SD: Tensor, rows_per_expert: Sequence[int], product: GroupedProduct
) -> Tensor:
    """All local experts with one grouped matrix product per projection.

    The weights stay separate parameters in DeepSpeed's layout. For the product they are stacked. This copies the local
    weights once per forward pass; the product reads them once per block of rows.

    Args:
        experts: of the form of `TwoProjections`; of their layers only weight and bias are read.
        rows_SD, rows_per_expert: as for `run_experts`.
    """
    members = list(experts.deepspeed_experts)
    ends_L = to_device(torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32), rows_SD.device)

    def project(rows: Tensor, layers: Sequence[Any]) -> Tensor:
        output = product(rows, torch.stack([layer.weight for layer in layers]), ends_L)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return _AddBias.apply(output, rows_per_expert, *biases) if biases else output

    inner_SF = project(rows_SD, [expert.input for expert in members])
    return activate_and_project(members[0], inner_SF, lambda rows: project(rows, [e.output for e in members]))


class _AddBias(torch.autograd.Function):
    """Each row plus the bias of its expert, in place. The gradient of a bias is one sum over its rows, which torch adds
    up in fp32. The gradient of a bias that is repeated for each row is a scatter of bf16 rows on a GPU. It rounds after
    each addition; over thousands of rows the sum is off by half. No tensor is kept for the backward pass, since a
    recomputation of the rows may stop before the product."""

    @staticmethod
    def forward(ctx: Any, rows_SO: Tensor, rows_per_expert: Sequence[int], *biases: Tensor) -> Tensor:
        ctx.mark_dirty(rows_SO)
        ctx.rows_per_expert = list(rows_per_expert)
        for part, bias in zip(rows_SO.split(ctx.rows_per_expert), biases, strict=True):
            part.add_(bias)
        return rows_SO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *(part.sum(0) for part in grads[0].split(ctx.rows_per_expert))


def initialize_experts(experts: Experts, first_global_id: int) -> None:
    """Gives every expert weights of its own, which depend on its global id only.

    DeepSpeed copies one expert, so that all experts of all ranks start equal. Here the `reset_parameters` of each
    expert's submodules initialise it anew. The seed combines the global id with a number from the default generator,
    which the ranks of a run seed alike. So a run does not depend on how many ranks share the experts.

    Experts on the meta device only get their seed, for `initialize_late`.
    """
    if torch.empty(0).is_meta:  # a whole model without memory, which nobody trains
        return
    base = int(torch.randint(2**62, ()).item())
    if any(parameter.is_meta for parameter in experts.parameters()):
        experts.seed = base + first_global_id
        for module in experts.modules():
            module.register_load_state_dict_pre_hook(_take_memory)
        return
    for local_id, expert in enumerate(experts.deepspeed_experts):
        reset_alone(expert, base + first_global_id + local_id)


def _take_memory(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Parameters on the meta device that a state dict has get memory for it; without, their values would be lost."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta and f"{prefix}{name}" in state_dict:
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="cpu")))


def initialize_late(experts: Experts, local_id: int) -> None:
    """Gives an expert that is still on the meta device memory, and the weights that it would have started with."""
    expert = experts.deepspeed_experts[local_id].to_empty(device="cpu")
    reset_alone(expert, int(experts.seed) + local_id)


def reset_alone(expert: nn.Module, seed: int) -> None:
    """Initialises an expert anew, by its seed and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**62)
        expert.apply(reset_parameters)


def reset_parameters(module: nn.Module) -> None:
    """Initialises a module's own parameters anew, if it knows how; for `nn.Module.apply`."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()


def count_on_all_ranks(experts: nn.Module) -> None:
    """Marks whole experts as different on every tensor-parallel rank, as their pieces under ZeRO are.

    Otherwise DeepSpeed counts only the first tensor-parallel rank's experts in the gradient norm.
    """
    for parameter in experts.parameters():
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # Megatron's mark
