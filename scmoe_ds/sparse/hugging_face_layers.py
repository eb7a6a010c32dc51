"""MoE layers of transformers' models under calibration: Mixtral, Qwen-MoE, DeepSeek and others with the same experts.

Shape suffixes: E experts, D hidden, F neurons of an expert, T tokens, K choices of a token, S rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scmoe_ds.checkpoint.autoep import shards
from scmoe_ds.errors import CheckpointError
from scmoe_ds.replace.modeling_adapted import blocks_of, moe_blocks
from scmoe_ds.sparse.importance import LayerSums, sorted_neurons
from scmoe_ds.sparse.sparsity_file import Sparsity


class FusedLayer:
    """A layer whose experts are two tensors, gate_up_proj [E, 2F, D] and down_proj [E, D, F]; see `CalibratedLayer`.

    Args:
        name: of the MoE layer in the model.
        layer: with `gate` and `experts`.
        top_k: K.

    Raises:
        CheckpointError: experts of another form.
    """

    has_w3 = True

    def __init__(self, name: str, layer: Any, top_k: int) -> None:
        self.name, self.top_k, self._experts = name, top_k, layer.experts
        if not _is_fused(self._experts):
            raise CheckpointError(
                f"{name}: experts of {type(self._experts).__name__} are not of the form W2 (act(W1 x) * W3 x) in two "
                "tensors, as those of Mixtral, Qwen-MoE and DeepSeek in transformers 5; take a model of such a family"
            )
        self.gate_ED: Tensor = layer.gate.weight
        self.input_FD: Tensor = self._experts.gate_up_proj[0]
        self.neurons = int(self._experts.down_proj.shape[2])

    def sums(self) -> LayerSums:
        """See `CalibratedLayer`."""
        return LayerSums(len(self._experts.down_proj), self.neurons, self._experts.down_proj.device)

    @contextmanager
    def watched(self, sums: LayerSums) -> Iterator[None]:
        """See `CalibratedLayer`."""
        hook = self._experts.register_forward_pre_hook(partial(self._add, sums), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _add(self, sums: LayerSums, experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | kwargs
        tokens_TD, chosen_TK, weight_TK = (given[name] for name in names)
        sums.add_choices(weight_TK if self.top_k == 1 else weight_TK / weight_TK.sum(1, keepdim=True))
        for expert in chosen_TK.unique().tolist():
            rows_SD = tokens_TD[(chosen_TK == expert).any(1)]
            gate_SF, up_SF = F.linear(rows_SD, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            sums.add_rows(expert, experts.act_fn(gate_SF), up_SF)

    @torch.no_grad()
    def sort(self, order_EF: Tensor) -> None:
        """Puts each expert's neurons in another order, in place.

        Args:
            order_EF: int64.
        """
        for number, order_F in enumerate(order_EF):
            gate_up, down = self._experts.gate_up_proj[number], self._experts.down_proj[number]
            gate_up.copy_(sorted_neurons(gate_up, order_F, 0, 2))
            down.copy_(sorted_neurons(down, order_F, 1))


def _is_fused(experts: Any) -> bool:
    weights = [getattr(experts, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(each, Tensor) and each.dim() == 3 for each in weights) or not hasattr(experts, "act_fn"):
        return False
    gate_up, down = weights
    alike = gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])  # type: ignore[union-attr]
    return alike and not hasattr(experts, "down_proj_bias") and not getattr(experts, "is_transposed", False)


def fused_layers(model: Any, source: str) -> list[FusedLayer]:
    """All MoE layers of a model of transformers, in its order.

    Args:
        source: flag and directory, for errors.

    Raises:
        CheckpointError: none, or layers that cannot be calibrated.
    """
    try:
        names = [name for name, _ in moe_blocks(blocks_of(model))]
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}, so there are no experts to sort; name a MoE model") from None
    top_k = int(model.config.num_experts_per_tok)
    if top_k == 1 and getattr(model.config, "norm_topk_prob", False):
        raise CheckpointError(
            f"{source}: num_experts_per_tok = 1 with norm_topk_prob: each token's score is 1, so that no threshold can "
            "tell its choices apart; take a model with more experts of a token"
        )
    found = [FusedLayer(f"{name}.mlp", model.get_submodule(f"{name}.mlp"), top_k) for name in names]
    fewest = min(len(layer.gate_ED) for layer in found)
    if not 1 <= top_k <= fewest:
        raise CheckpointError(
            f"{source}: num_experts_per_tok = {top_k}: must be 1 … {fewest}, a layer's experts; correct config.json"
        )
    return found


def write_directory(model: Any, source: Path, out: Path, sparsity: Sparsity) -> None:
    """Writes the model as transformers does, with the source's tokenizer and what was calibrated.

    Raises:
        CheckpointError: a directory that is not empty or cannot be written.
    """
    part = shards.claim(out)
    with shards.one_sentence(out):
        model.save_pretrained(part)
        shards.carry(source, part)
        sparsity.write(part)
        shards.publish(part, out)
