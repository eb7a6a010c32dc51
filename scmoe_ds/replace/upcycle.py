"""Makes MoE layers of a dense model's MLPs; experts start as copies of them ("sparse upcycling", arXiv 2212.05055), or
as slices."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from scmoe_ds.config.loading import Source
from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.moe.build import build_moe
from scmoe_ds.moe.checks import check_model
from scmoe_ds.moe.experts import has_two_projections
from scmoe_ds.moe.placement import own_first_expert
from scmoe_ds.parallel.output import log
from scmoe_ds.planner.schedule_text import names_text
from scmoe_ds.replace.description import describe_replacement
from scmoe_ds.replace.layer import HookedScMoE
from scmoe_ds.replace.replacement import replaced_layers
from scmoe_ds.replace.slices import NeuronSlices
from scmoe_ds.replace.taps import MLP_NAMES, POST_ATTENTION_NORMS
from scmoe_ds.replace.token_mask import TokenMask

_NEEDED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class MoEFeedForward(nn.Module):
    """A MoE in the place of an MLP. It returns the hidden states alone, as the block around it expects.

    Attributes:
        moe: DeepSpeed's layer, or the ScMoE that took its place.
        token_mask: knows which tokens are padding, for DeepSpeed's layer.
        l_aux: load-balancing loss of the last forward pass; None before the first.
        exp_counts: [E] tokens per expert before drops, of the same pass.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe
        self.token_mask: TokenMask | None = None
        self.l_aux: Tensor | None = None
        self.exp_counts: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "l_aux": None}  # its graph belongs to a forward pass; a copy has had none

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        used_token = None
        # The pair of a HookedScMoE has a mask of its own.
        if self.token_mask is not None and not isinstance(self.moe, HookedScMoE):
            used_token = self.token_mask.of(hidden_states)
        output, self.l_aux, self.exp_counts = self.moe(hidden_states, used_token)
        return output


@dataclass(frozen=True)
class _Block:
    """A block whose MLP can be taken; `index` counts within its ModuleList."""

    name: str
    index: int
    module: nn.Module
    mlp_name: str
    hidden_size: int

    @property
    def mlp(self) -> nn.Module:
        return self.module.get_submodule(self.mlp_name)


def moe_from_dense(
    model: nn.Module,
    config: Source | ScMoEConfig,
    layers: Sequence[int] | None = None,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Replaces MLPs of a dense model by MoE layers, in place. Every expert is a copy of the MLP, or with
    `moe_ffn_hidden_size` a slice of its neurons, times the number of slices: expert e gets slice e modulo that number.

    Architecture "topk" makes DeepSpeed's MoE, "shared_expert" its Residual MoE, "scmoe" a ScMoE that hooks feed (see
    `replace_moe_layers`). The shared expert of the latter two is the old MLP itself. A shortcut norm of its own starts
    as a copy of the norm through which the backbone reads the tapped value. Tokens that the model's `attention_mask`
    [batch, sequence] masks go to no routed expert.

    Args:
        model: its blocks are members of an nn.ModuleList and have an `mlp` behind a norm: GPT-2, LLaMA, Mistral, Qwen2,
            GPT-NeoX, ViT, Swin of transformers 5, and models with the same names.
        config: a DeepSpeed JSON with a "scmoe" section (a path or a dict), or a ScMoEConfig; gives all sizes.
        layers: numbers of the blocks, counted through the model; None: the last of every `moe_every` of a ModuleList.
        noise: standard deviation of the noise on each expert's parameters, relative to their root mean square. With 0
            the experts start equal, and in training only the gate's weights make them differ.
        seed: of the noise. The noise of an expert depends on its global id, not on how many ranks share the experts.

    Returns:
        the same model; add `load_balancing_loss(model)` to its loss.

    Raises:
        ScMoEConfigError: no such blocks, a number that does not exist, a MoE already; the model is then as it was.
    """
    check_model(model)
    config = ScMoEConfig.from_deepspeed(config)
    _check_config(config, noise)
    all_blocks = _dense_blocks(model)
    blocks = _chosen(all_blocks, config, layers)
    _require_dense(model, blocks, config)
    numbers = config.experts_of_layers(len(blocks))
    kept = [block.mlp for block in blocks]
    for number, (block, experts) in enumerate(zip(blocks, numbers, strict=True)):
        moe = _make_moe(block, experts, config)
        if noise:
            _perturb(moe, noise, (seed * 1_000_003 + number) * 1_000_003)
        setattr(block.module, block.mlp_name, MoEFeedForward(moe).train(block.mlp.training))
    of_all = f"of {len(all_blocks)} MLPs"
    try:
        if config.architecture == "scmoe":
            said = describe_replacement(model, _shortcut(model, config), of_all)
        else:
            said = [f"replaced {len(blocks)} {of_all} of {type(model).__name__} by {_described(blocks, config)}"]
    except ScMoEConfigError:
        for block, mlp in zip(blocks, kept, strict=True):
            setattr(block.module, block.mlp_name, mlp)
        raise
    feeds = {name: module for name, module in model.named_modules() if isinstance(module, MoEFeedForward)}
    token_mask = TokenMask(model, list(feeds))
    for feed in feeds.values():
        feed.token_mask = token_mask
    log(*said)
    return model


def load_balancing_loss(model: nn.Module) -> Tensor:
    """Sum of the load-balancing losses of the last forward pass, for you to weigh and add to the model's loss.

    Args:
        model: what `moe_from_dense` returned, or an engine of it.

    Returns:
        a differentiable scalar, fp32.

    Raises:
        ScMoEConfigError: it holds no layer made by `moe_from_dense`.
        RuntimeError: no forward pass has been run.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, MoEFeedForward)]
    if not layers:
        raise ScMoEConfigError("the model holds no layer made by moe_from_dense")
    losses = [layer.l_aux for layer in layers if layer.l_aux is not None]
    if not losses:
        raise RuntimeError("load_balancing_loss: call the model first, its layers keep the loss of the last forward")
    return torch.stack([loss.float() for loss in losses]).sum()


def _check_config(config: ScMoEConfig, noise: float) -> None:
    if config.architecture not in ("scmoe", "topk", "shared_expert"):
        raise ScMoEConfigError(
            f'scmoe.architecture = "{config.architecture}": moe_from_dense makes "scmoe", "topk" and "shared_expert"'
        )
    if width := config.moe_shared_expert_intermediate_size:
        rule = "the shared expert of moe_from_dense is the dense MLP itself; remove the field"
        raise fail("scmoe.moe_shared_expert_intermediate_size", width, rule)
    if noise < 0:
        raise ScMoEConfigError(f"noise = {noise}: must be at least 0")
    if config.expert_parallel_size > 1 and not dist.is_initialized():
        raise ScMoEConfigError(
            f"scmoe.expert_parallel_size = {config.expert_parallel_size}: call scmoe_ds.connect() before "
            "moe_from_dense, because which experts to make depends on the rank"
        )


def _dense_blocks(model: nn.Module) -> list[_Block]:
    found = []
    for list_name, blocks in model.named_modules():
        for index, block in enumerate(blocks) if isinstance(blocks, nn.ModuleList) else ():
            children = dict(block.named_children())
            mlp = next((name for name in MLP_NAMES if name in children), None)
            norm = next((children[name] for name in POST_ATTENTION_NORMS if name in children), None)
            weight = getattr(norm, "weight", None)
            if mlp is not None and isinstance(weight, Tensor):
                found.append(_Block(f"{list_name}.{index}", index, block, mlp, weight.shape[-1]))
    if not found:
        raise ScMoEConfigError(
            f"moe_from_dense: {type(model).__name__} has no nn.ModuleList of blocks with an MLP "
            f"({', '.join(MLP_NAMES)}) behind a norm ({', '.join(POST_ATTENTION_NORMS)}); give them these names, or "
            "put deepspeed.moe.layer.MoE there yourself and call replace_moe_layers"
        )
    return found


def _chosen(blocks: list[_Block], config: ScMoEConfig, layers: Sequence[int] | None) -> list[_Block]:
    if layers is None:
        chosen = [block for block in blocks if (block.index + 1) % config.moe_every == 0]
        if not chosen:
            raise ScMoEConfigError(
                f"scmoe.moe_every = {config.moe_every}: the model has only {len(blocks)} blocks; "
                "use less, or give moe_from_dense the layers"
            )
    else:
        for number in layers:
            if not 0 <= number < len(blocks):
                raise ScMoEConfigError(
                    f"layers = {list(layers)}: there is no block {number}, the model has 0 … {len(blocks) - 1}"
                )
        if not layers or len(set(layers)) < len(layers):
            raise ScMoEConfigError(f"layers = {list(layers)}: name at least one block, and each of them once")
        chosen = [blocks[number] for number in sorted(layers)]
    return chosen


def _require_dense(model: nn.Module, blocks: list[_Block], config: ScMoEConfig) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            raise ScMoEConfigError(
                f"{name} is a MoE already: moe_from_dense wants a dense model, replace_moe_layers "
                "takes one with DeepSpeed's MoE"
            )
    for block in blocks:
        _slices(block, config)
        named = f"{block.name}.{block.mlp_name} ({type(block.mlp).__name__})"
        parts = [f"{name} {type(module).__name__}".lower() for name, module in block.mlp.named_modules()]
        if any("expert" in part or "moe" in part for part in parts):
            raise ScMoEConfigError(
                f"{named} is a MoE already: moe_from_dense wants an MLP there; leave the block out of layers"
            )
        parameters = list(inspect.signature(block.mlp.forward).parameters.values())
        more = [each.name for each in parameters[1:] if each.default is each.empty and each.kind in _NEEDED]
        if more:
            raise ScMoEConfigError(
                f"{named} takes {', '.join(more)} beside the hidden states, which an expert does "
                "not get: leave the block out of layers, or put deepspeed.moe.layer.MoE there "
                "yourself and call replace_moe_layers"
            )


def _make_moe(block: _Block, num_experts: int, config: ScMoEConfig) -> MoE:
    own = "topk" if config.architecture == "topk" else "shared_expert"  # a ScMoE takes its place at the end
    # Each rank pads its own batch, and generates for its own prompts.
    unequal = config.expert_parallel_size > 1
    slices = _slices(block, config)
    expert = block.mlp if slices is None else slices.slice(0)
    moe = build_moe(config, block.hidden_size, expert, num_experts, architecture=own, unequal=unequal)
    if slices is not None:
        slices.put_into(moe)
    for expert in moe.deepspeed_moe.experts.deepspeed_experts:
        if not has_two_projections(expert):  # which are computed together as long as nobody watches one of them
            expert.register_forward_pre_hook(_contiguous)
    dense = next(block.mlp.parameters())
    return moe.to(device=dense.device, dtype=dense.dtype)


def _slices(block: _Block, config: ScMoEConfig) -> NeuronSlices | None:
    """The narrower experts of a block; None: copies of its MLP."""
    width, name = config.moe_ffn_hidden_size, f"{block.name}.{block.mlp_name}"
    return None if width is None else NeuronSlices(name, block.mlp, block.hidden_size, width)


def _contiguous(expert: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """DeepSpeed hands an expert a part of a buffer, which is not contiguous; GPT-2's layers need contiguous rows."""
    return (args[0].contiguous(), *args[1:])


def _perturb(moe: MoE, noise: float, first_seed: int) -> None:
    """Adds noise to every expert's parameters that depends on the expert's global id alone."""
    for number, expert in enumerate(moe.deepspeed_moe.experts.deepspeed_experts, own_first_expert(moe)):
        generator = torch.Generator().manual_seed((first_seed + number) % 2**63)
        for parameter in expert.parameters():
            held = parameter.detach()
            random = torch.randn(held.shape, generator=generator).to(held)
            held.add_(random, alpha=noise * float(held.float().square().mean().sqrt()))


def _described(blocks: Sequence[_Block], config: ScMoEConfig) -> str:
    kind = "MoE" if config.architecture == "topk" else "Residual MoE"
    names = names_text([f"{block.name}.{block.mlp_name}" for block in blocks])
    return f"DeepSpeed's {kind}: {names} (top-{config.top_k} of {config.num_experts} experts)"


def _shortcut(model: nn.Module, config: ScMoEConfig) -> list[HookedScMoE]:
    """Makes ScMoE layers of DeepSpeed's Residual MoEs, with the merge of the section."""
    own: dict[str, Any] = {"merge": config.merge, "top_k": config.top_k}  # counts as chosen, also where it is a default
    layers = replaced_layers(model, config.model_copy(update=own))
    for layer in layers:
        if layer.shortcut_norm is not None:
            assert layer.pair is not None and layer.pair.tap.norm is not None
            layer.shortcut_norm.load_state_dict(layer.pair.tap.norm.state_dict())
    return layers
