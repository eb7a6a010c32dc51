"""A trained Hugging Face MoE model whose MoE layers are ScMoE (shortcut-connected, arXiv 2404.05019), in one file.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

The model is the one of transformers, with its weights and their names. In an MoE layer of the original the routed
experts read the current block; in a ScMoE they read the preceding one, through a shortcut. What lies between tap and
join does not depend on them, so that their communication can run beside it:

    tap ─► norm ─► router ── dispatch ──► routed experts ── combine ──► join
     │                                                                    │
     └──► (mlp) ──► attention ──► shared expert (if there is one) ────────┘

    position  pos1: tap = input of the block with the MoE; pos2: the stream between attention and MLP of the block
              before, pos3: its input, where that block is dense
    join      end: at the end of the block; late: behind the next block's attention
    merge     add: shared + routed; cg1: sigmoid(c) · shared + routed; cg2: softmax(c), whose first weighs the routed

This file computes one after the other, on one device, with hooks on the model's own modules. scmoe_ds, which has
written it, trains with the experts on several ranks and with the overlap. It needs torch and transformers alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

TAPS = {"pos1": "input_layernorm", "pos2": "post_attention_layernorm", "pos3": "input_layernorm"}
"""Through which norm a block reads the tapped value."""
SHARED = ("shared_experts", "shared_expert")
"""What the families call the shared expert of an MoE layer."""
ROWS = {"add": 0, "cg1": 1, "cg2": 2}
"""Of the coefficient's weight, by merge."""


class SharedExpert(nn.Module):
    """A SwiGLU MLP that every token passes: [..., D] → [..., D].

    Args:
        hidden_size: D.
        width: of its inner activation, as that of a routed expert.
        activation: transformers' name of the experts' activation.
    """

    def __init__(self, hidden_size: int, width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.inner(hidden_states))
        return output

    def inner(self, hidden_states: Tensor) -> Tensor:
        """What the last projection reads: [..., D] → [..., width]."""
        activation: Tensor = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return activation


class ShortcutParts(nn.Module):
    """Parameters that a decoder layer has more when its MoE is a ScMoE; the layer's child `shortcut`.

    Args:
        norm: what the tapped value goes through; None: the norm through which the model itself reads it.
        shared_expert: of a source without one; None: the source's own, or none at all.
        coefficient: [..., D] → the logits of the merge: Linear(D, 1) for cg1, Linear(D, 2) for cg2, of which row 0
            weighs the routed experts; None: both outputs are added.

    Attributes:
        converted: how passes that begin from now on run: True as ScMoE, False as the source.
    """

    converted = True

    def __init__(
        self,
        norm: nn.Module | None = None,
        shared_expert: SharedExpert | None = None,
        coefficient: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.shared_expert, self.coefficient = norm, shared_expert, coefficient


class _Silent(nn.Module):
    """In the place of a shared expert while the routed experts run alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class Shortcut:
    """One MoE layer as a ScMoE: its hooks, and what is on its way from the tap to the join.

    Args:
        name: the layer's path, for errors.
        block: the decoder layer that holds it; its child `shortcut` has the parts.
        tap: the norm through which a block reads the tapped value.
        attention: behind which the routed output joins; None: at the end of the block.
        top_k: routed experts per token; None: as the source.
        crosses: whether tap or join lie in another block.

    Attributes:
        of_source: the MoE layer's forward as the source has it.
    """

    def __init__(
        self, name: str, block: Any, tap: nn.Module, attention: nn.Module | None, top_k: int | None, crosses: bool
    ) -> None:
        self.name, self.block, self.mlp, self.parts = name, block, block.mlp, block.shortcut
        self.top_k, self.crosses, self.is_late = top_k, crosses, attention is not None
        self.shared_name = next((each for each in SHARED if hasattr(self.mlp, each)), None)
        self.of_source = self.mlp.forward
        self._shortcut: Tensor | None = None
        self._late: Tensor | None = None
        self.mlp.forward = self.forward
        self._handles = [tap.register_forward_hook(self._tap)]
        if attention is not None:
            self._handles.append(attention.register_forward_hook(self._join))

    def detach(self) -> None:
        """Leaves the model as transformers made it; the parts stay."""
        for handle in self._handles:
            handle.remove()
        self.mlp.__dict__.pop("forward", None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The MoE layer's own forward, of [B, S, D]."""
        shortcut, self._shortcut, self._late = self._shortcut, None, None  # a pass that failed may have left the latter
        if not self.parts.converted:
            output: Tensor = self.of_source(hidden_states)
            return output
        if self.crosses and torch.is_grad_enabled() and getattr(self.block, "gradient_checkpointing", False):
            raise ValueError(
                f"{self.name}: gradient checkpointing of single blocks needs a shortcut within the block, position "
                '"pos1" and join "end"; call model.gradient_checkpointing_disable()'
            )
        if shortcut is None or shortcut.shape != hidden_states.shape:
            raise RuntimeError(f"{self.name}: the block was not called as a whole, so that nothing was tapped for it")
        shortcut = shortcut.to(hidden_states.device)  # from a block that may be on another one
        known, routed = self._weighted(hidden_states, self.shared(hidden_states), self.routed(shortcut))
        if not self.is_late:
            return routed if known is None else known + routed
        self._late = routed
        return torch.zeros_like(hidden_states) if known is None else known

    def routed(self, shortcut: Tensor) -> Tensor:
        """Router and routed experts alone, of [B, S, D]: the layer's own forward with its shared expert silent."""
        name = self.shared_name
        routers: list[Any] = [each for each in (self.mlp, getattr(self.mlp, "gate", None)) if hasattr(each, "top_k")]
        before = [each.top_k for each in routers]
        shared = None if name is None else getattr(self.mlp, name)
        try:
            if name is not None:
                setattr(self.mlp, name, _Silent())
            for each in routers:
                each.top_k = each.top_k if self.top_k is None else self.top_k
            output: Tensor = self.of_source(shortcut)
            return output
        finally:
            if name is not None:
                setattr(self.mlp, name, shared)
            for each, top_k in zip(routers, before, strict=True):
                each.top_k = top_k

    def shared(self, hidden_states: Tensor) -> Tensor | None:
        """The shared expert, of [B, S, D]; None: there is none."""
        if self.parts.shared_expert is not None:
            output: Tensor = self.parts.shared_expert(hidden_states)
            return output
        if self.shared_name is None:
            return None
        output = getattr(self.mlp, self.shared_name)(hidden_states)
        gate = getattr(self.mlp, "shared_expert_gate", None)
        return output if gate is None else torch.sigmoid(gate(hidden_states)) * output

    def _weighted(self, hidden_states: Tensor, shared: Tensor | None, routed: Tensor) -> tuple[Tensor | None, Tensor]:
        """Both outputs times their weights."""
        coefficient = self.parts.coefficient
        if coefficient is None or shared is None:
            return shared, routed
        logits = coefficient(hidden_states)
        if logits.shape[-1] == ROWS["cg1"]:
            return shared * torch.sigmoid(logits), routed
        weights = torch.softmax(logits, dim=-1)
        return shared * weights[..., 1:], routed * weights[..., :1]

    def _tap(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.parts.converted:
            own = self.parts.norm
            self._shortcut = output if own is None else own(args[0])

    def _join(self, attention: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        late, self._late = self._late, None
        if late is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + late.to(output[0].device), *output[1:])
        return output + late.to(output.device)


def install(model: Any, scmoe: Mapping[str, Any]) -> dict[int, ShortcutParts]:
    """Makes MoE layers of a model of transformers ScMoE, in place.

    Args:
        model: a causal language model whose decoder layers have input_layernorm, an attention,
            post_attention_layernorm and mlp.
        scmoe: position, first_layer_position, join, merge, shortcut_norm, top_k and adapt (layers, shared_expert), as
            in the "scmoe" section of a DeepSpeed JSON; top_k null: as the source.

    Returns:
        number of each converted MoE layer, counted from 0 over the model, to its parts.

    Raises:
        ValueError: a layer or a position that the model cannot have, or a merge without a shared expert.
    """
    uninstall(model)
    blocks = blocks_of(model)
    parts = add_parts(model, scmoe)
    top_k = scmoe.get("top_k")
    shortcuts = []
    for number, (name, place) in enumerate(moe_blocks(blocks)):
        if number not in parts:
            continue
        position = position_of(scmoe, number)
        block = blocks[place][1]
        tapped = block if position == "pos1" else blocks[place - 1][1]
        is_late = scmoe.get("join") == "late" and place + 1 < len(blocks)
        attention = _attention(*blocks[place + 1]) if is_late else None
        tap = getattr(tapped, TAPS[position])
        shortcuts.append(Shortcut(f"{name}.mlp", block, tap, attention, top_k, is_late or tapped is not block))
    model.scmoe_shortcuts = shortcuts
    if top_k is not None and parts:
        balance_for(model, top_k)
    return parts


def uninstall(model: Any) -> None:
    """Takes the hooks of `install` away; the parts stay, for who drives the layers instead."""
    for each in model.__dict__.pop("scmoe_shortcuts", ()):
        each.detach()
        balance_for(model, None)


def balance_for(model: Any, top_k: int | None) -> None:
    """Tells a model with a balancing loss how many experts a token is routed to; None: as many as in the source."""
    if hasattr(model, "num_experts_per_tok"):
        model.num_experts_per_tok = model.config.num_experts_per_tok if top_k is None else top_k


def add_parts(model: Any, scmoe: Mapping[str, Any]) -> dict[int, ShortcutParts]:
    """Gives the converted layers' blocks their child `shortcut`, with what `scmoe` asks for; see `install`.

    A new norm is a copy of the one before the MoE, behind which the routed experts were trained. A shared expert and a
    coefficient have torch's initial values.
    """
    blocks, adapt = blocks_of(model), scmoe.get("adapt") or {}
    layers, found = moe_blocks(blocks), {}
    numbers = range(len(layers)) if adapt.get("layers") is None else sorted(adapt["layers"])
    for number in numbers:
        if not 0 <= number < len(layers):
            raise ValueError(f"layers: there is no MoE layer {number}; the model has 0 … {len(layers) - 1}")
        name, place = layers[number]
        check_position(blocks, place, position_of(scmoe, number))
        block = blocks[place][1]
        if not hasattr(block, "shortcut"):
            block.shortcut = _parts(model, name, block, scmoe)
        found[number] = block.shortcut
    return found


def _parts(model: Any, name: str, block: Any, scmoe: Mapping[str, Any]) -> ShortcutParts:
    norm = block.post_attention_layernorm
    hidden_size, like = norm.weight.shape[0], {"device": norm.weight.device, "dtype": norm.weight.dtype}
    own_norm = copy.deepcopy(norm) if scmoe.get("shortcut_norm") == "own" else None
    kind, merge = (scmoe.get("adapt") or {}).get("shared_expert"), scmoe.get("merge") or "add"
    has_shared, shared = any(hasattr(block.mlp, each) for each in SHARED), None
    if kind not in (None, "none"):
        if has_shared:
            raise ValueError(f'adapt.shared_expert "{kind}": {name}.mlp has a shared expert already; use "none"')
        width = block.mlp.experts.down_proj.shape[-1]
        shared = SharedExpert(hidden_size, width, model.config.hidden_act).to(**like)
    if ROWS[merge] and shared is None and not has_shared:
        raise ValueError(f'merge "{merge}": {name}.mlp has no shared expert; use "add", or add a shared expert')
    coefficient = nn.Linear(hidden_size, ROWS[merge], **like) if ROWS[merge] else None
    return ShortcutParts(own_norm, shared, coefficient)


def blocks_of(model: Any) -> list[tuple[str, Any]]:
    """Paths and modules of the decoder layers.

    Raises:
        ValueError: none, or blocks that a shortcut cannot be laid in.
    """
    for name, each in model.named_modules():
        if isinstance(each, nn.ModuleList) and any(_has_moe(block) for block in each):
            blocks = [(f"{name}.{place}", block) for place, block in enumerate(each)]
            break
    else:
        raise ValueError(f"{type(model).__name__} has no MoE layer")
    for name, block in blocks:
        norm = getattr(block, "input_layernorm", None)
        if isinstance(norm, nn.ModuleList):
            raise ValueError(f"{name} ({type(block).__name__}) has a shortcut of its own already")
        if norm is None or hasattr(block, "post_feedforward_layernorm"):
            raise ValueError(
                f"{name} ({type(block).__name__}) has no norm before its attention; a shortcut needs a pre-norm model"
            )
    return blocks


def moe_blocks(blocks: list[tuple[str, Any]]) -> list[tuple[str, int]]:
    """Path and place of the blocks with an MoE layer, in order."""
    return [(name, place) for place, (name, block) in enumerate(blocks) if _has_moe(block)]


def position_of(scmoe: Mapping[str, Any], number: int) -> str:
    """Of the shortcut of an MoE layer, by its number."""
    first = scmoe.get("first_layer_position") if number == 0 else None
    return first or scmoe.get("position") or "pos1"


def check_position(blocks: list[tuple[str, Any]], place: int, position: str) -> None:
    """Raises a ValueError for a position that a block cannot have."""
    name = blocks[place][0]
    if position not in TAPS:
        raise ValueError(f'position "{position}": must be one of {", ".join(TAPS)}')
    if position == "pos1":
        return
    if place == 0:
        raise ValueError(f'position "{position}": {name} is the first block, nothing precedes it; use "pos1"')
    if _has_moe(blocks[place - 1][1]):
        raise ValueError(
            f'position "{position}": the block before {name} has an MoE itself and no dense MLP; use "pos1", and '
            "first_layer_position for a layer behind a dense block"
        )


def _has_moe(block: Any) -> bool:
    return hasattr(getattr(block, "mlp", None), "experts")


def _attention(name: str, block: Any) -> nn.Module:
    for child, module in block.named_children():
        if "attn" in child and "norm" not in child:
            found: nn.Module = module
            return found
    raise ValueError(f'join "late": {name} ({type(block).__name__}) has no attention; use "end"')


def load_names_as(model_type: str, source: str) -> None:
    """Has transformers read and write the weights of a model type of this file as it does those of the source's."""
    from transformers import conversion_mapping

    mapping = conversion_mapping.get_checkpoint_conversion_mapping(source)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
