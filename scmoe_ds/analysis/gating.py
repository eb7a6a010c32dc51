"""Measures the gate's choices at both ends of a shortcut (paper figure 9), the experts' load, and dropped choices.

Each MoE layer has a *current* representation, the output of its block's attention sub-layer, and a *preceding* one,
which the shortcut taps. The model reads each of them, in a pre-norm Transformer, after a norm:

    current     the MoE block's `mlp_norm`
    preceding   the shortcut's own norm; with `shortcut_norm` "shared" the backbone's norm of the tapped value. Without
                a shortcut: the backbone's norm of the value that `position` would tap (Pos-1 when every block has an
                MoE)

In a post-norm Transformer both already are normalised, except the embedding. Only a shortcut's own norm is added.

The same gate is applied to both. A score is a probability among all experts, whatever `gate_softmax` says.

Shape suffixes: T tokens, D hidden, E experts, K routed experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn

from scmoe_ds.analysis.probes import Capture, Probe, Representation
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import AnalysisError
from scmoe_ds.models.gpt import GPT
from scmoe_ds.models.pairs import tap_of
from scmoe_ds.moe.capacity import capacity

SCALARS = (
    "same_expert_share",
    "cosine",
    "l2",
    "preceding_score",
    "current_score",
    "load_max_over_mean",
    "load_entropy",
    "drop_rate",
)
"""The numbers of a layer's record beside "load"."""


@dataclass(frozen=True)
class GateLayer:
    """One MoE layer.

    Attributes:
        block: of the MoE, from 0.
        preceding, current: the representations, and where the model reads them.
        gate: the layer's own.
        architecture: "scmoe" routes the preceding representation, "dgmoe" both, others route the current one.
        capacity_factor, min_capacity: of training; a factor of None drops nothing.
    """

    block: int
    preceding: Probe
    current: Probe
    gate: TopKGate
    architecture: str
    capacity_factor: float | None
    min_capacity: int


def gate_layers(model: nn.Module, trained: ScMoEConfig) -> list[GateLayer]:
    """All MoE layers of a GPT of this package.

    Args:
        model: may run without drops.
        trained: the section of its training, for drops.

    Raises:
        AnalysisError: no MoE layer has two or more experts.
    """
    layers = []
    for number, pair in enumerate(model.runs if isinstance(model, GPT) else ()):
        blocks = pair.blocks
        first, last, section = number * len(blocks), blocks[-1], trained.of_layer(number)
        tap = _tap(section, number)
        tapped = blocks[tap // 2]
        read = tapped.where_read("mlp" if tap % 2 else "attention")
        if (own_norm := getattr(pair, "shortcut_norm", None)) is not None:
            read = (own_norm, "output")
        block = first + tap // 2
        kind = Representation("attention", block) if tap % 2 else Representation("mlp", block - 1)
        current = Representation("attention", first + len(blocks) - 1)
        gate = last.moe.deepspeed_moe.gate
        if gate.wg.out_features > 1:
            factor = trained.capacity_factor if trained.drop_tokens else None
            preceding = Probe(kind if block or tap % 2 else Representation("input", 0), (read,))
            probe, least = Probe(current, (last.where_read("mlp"),)), trained.min_capacity
            layers.append(GateLayer(current.block, preceding, probe, gate, section.architecture, factor, least))
    if not layers:
        raise AnalysisError("the model has no MoE layers with at least two experts: there is no gate to analyse")
    return layers


def _tap(config: ScMoEConfig, pair: int) -> int:
    """The number of the pair's operators before its tap, or before the tap that a shortcut would have."""
    position = (config.first_layer_position if pair == 0 else None) or config.position
    if config.has_shortcut:
        return tap_of(config, position)
    position = "pos1" if config.moe_every == 1 else position
    return tap_of(config.model_copy(update={"architecture": "scmoe"}), position)


class GatingSums:
    """Running sums over tokens of one layer, float64.

    Args:
        layer: whose gate it is.

    Attributes:
        values: [8 + E]: tokens; sums of same choices, cosines, distances, preceding and current scores; dropped
            choices; choices; choices of each expert. Adds up over batches and ranks.
    """

    def __init__(self, layer: GateLayer) -> None:
        self.layer = layer
        weight = layer.gate.wg.weight
        self.values = torch.zeros(8 + len(weight), dtype=torch.float64, device=weight.device)

    @torch.no_grad()
    def add(self, preceding: Tensor, current: Tensor) -> None:
        """
        Args:
            preceding, current: [..., D] after their norms; the tokens of one micro-batch, which share the capacity.

        Raises:
            AnalysisError: a value is not finite.
        """
        for probe, value in ((self.layer.preceding, preceding), (self.layer.current, current)):
            if not bool(torch.isfinite(value).all()):
                raise AnalysisError(
                    f"{probe.representation.name} is not finite behind its norm: the weights are not "
                    "finite, or the dtype cannot hold what the model computes"
                )
        preceding_TD, current_TD = (value.reshape(-1, value.shape[-1]) for value in (preceding, current))
        logits_TE, current_logits_TE = self._logits(preceding_TD), self._logits(current_TD)
        preceding_TE, current_TE = logits_TE.softmax(1), current_logits_TE.softmax(1)
        first_T, second_T = preceding_TE.argmax(1), current_TE.argmax(1)
        same = (first_T == second_T).sum()
        if self.layer.architecture == "dgmoe":  # the second choice must be another expert (paper eq. 23)
            experts_E = torch.arange(current_TE.shape[1], device=current_TE.device)
            allowed_TE = current_logits_TE.masked_fill(first_T.unsqueeze(1) == experts_E, float("-inf"))
            second_T = allowed_TE.softmax(1).argmax(1)
            parts = [first_T.unsqueeze(1), second_T.unsqueeze(1)]
        else:
            read_TE = preceding_TE if self.layer.architecture == "scmoe" else current_TE
            parts = [read_TE.topk(self.layer.gate.k, dim=1).indices]
        counts = [torch.bincount(chosen_TK.flatten(), minlength=current_TE.shape[1]) for chosen_TK in parts]
        dropped = sum(self._dropped(chosen_TK, count_E) for chosen_TK, count_E in zip(parts, counts, strict=True))
        load_E = torch.stack(counts).sum(0)
        a_TD, b_TD = preceding_TD.double(), current_TD.double()
        scalars = [
            len(first_T),
            same,
            F.cosine_similarity(a_TD, b_TD, dim=1).sum(),
            (a_TD - b_TD).norm(dim=1).sum(),
            preceding_TE.gather(1, first_T.unsqueeze(1)).double().sum(),
            current_TE.gather(1, second_T.unsqueeze(1)).double().sum(),
            dropped,
            load_E.sum(),
        ]
        device = self.values.device
        joined = [torch.as_tensor(each, dtype=torch.float64, device=device) for each in scalars]
        self.values += torch.cat([torch.stack(joined), load_E.double()])

    def _logits(self, value_TD: Tensor) -> Tensor:
        return F.linear(value_TD.float(), self.layer.gate.wg.weight.float())

    def _dropped(self, chosen_TK: Tensor, count_E: Tensor) -> Tensor | int:
        """The choices that DeepSpeed's gate would drop, because they exceed an expert's capacity."""
        if self.layer.capacity_factor is None:
            return 0
        factor = self.layer.capacity_factor * chosen_TK.shape[1]
        limit = capacity(len(chosen_TK), len(count_E), factor, self.layer.min_capacity)
        return (count_E - limit).clamp(min=0).sum()

    def record(self) -> dict[str, Any]:
        """JSON values: "block", the ends' names, `SCALARS`, and "load", each expert's share of the choices.

        The entropy over experts is in nats; that of an even load is log(E).

        Raises:
            AnalysisError: there were no tokens.
        """
        if not self.values[0]:
            raise AnalysisError("there are no tokens to gate: give more data")
        tokens, *sums, dropped, choices = self.values[:8].tolist()
        share = (self.values[8:] / choices).tolist()
        entropy = -sum(part * math.log(part) for part in share if part)
        scalars = [*(each / tokens for each in sums), max(share) * len(share), entropy, dropped / choices]
        return {
            "block": self.layer.block,
            "preceding": self.layer.preceding.representation.name,
            "current": self.layer.current.representation.name,
            **dict(zip(SCALARS, scalars, strict=True)),
            "load": share,
        }


class GatingSumsOfModel:
    """The sums of all layers, and the probes that feed them during a forward pass.

    Args:
        layers: of `gate_layers`.
    """

    def __init__(self, layers: Sequence[GateLayer]) -> None:
        self.layers = [GatingSums(layer) for layer in layers]
        self.probes = [probe for layer in layers for probe in (layer.preceding, layer.current)]

    def add(self, capture: Capture) -> None:
        """Adds the values of a capture of `probes`."""
        values = capture.take()
        for sums, preceding, current in zip(self.layers, values[::2], values[1::2], strict=True):
            sums.add(preceding, current)


@torch.inference_mode()
def measure(
    model: GPT, trained: ScMoEConfig, run: Callable[[Tensor], object], batches: Iterable[Tensor]
) -> list[dict[str, Any]]:
    """Records of all layers over a data set; nothing of a batch is kept.

    Args:
        model: in evaluation mode.
        trained: the section of its training.
        run: a forward pass.
        batches: [B, S] tokens, each one micro-batch, whose tokens share the capacity.

    Raises:
        AnalysisError: the model has no gates, or a value is not finite; names the batch.
    """
    sums = GatingSumsOfModel(gate_layers(model, trained))
    for number, batch in enumerate(batches):
        with Capture(sums.probes) as capture:
            run(batch.to(model.embedding.weight.device))
            try:
                sums.add(capture)
            except AnalysisError as error:
                raise AnalysisError(f"batch {number}: {error}") from None
    return [layer.record() for layer in sums.layers]
