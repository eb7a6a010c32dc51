"""GPT-2/GPT-3 and LLaMA-2 style language models with an MoE in every, every second, … block.

Shape suffixes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers.utils import ModelOutput

from scmoe_ds.config.messages import fail
from scmoe_ds.config.section import ScMoEConfig
from scmoe_ds.errors import ScMoEConfigError
from scmoe_ds.models.distillation import TEXT_ALONE, Targets, masked_mean
from scmoe_ds.models.layers import GPTSettings, make_norm
from scmoe_ds.models.make_pairs import conversion_of, make_pairs
from scmoe_ds.models.pairs import PlainPair, StagedPair
from scmoe_ds.models.parallel_layers import (
    Group,
    column_parallel,
    gather_vocabulary,
    size_of,
    vocabulary_cross_entropy,
    vocabulary_embedding,
    vocabulary_logits,
)
from scmoe_ds.models.recompute import Recompute
from scmoe_ds.overlap.executor import PairOutput, Step


@dataclass
class GPTOutput(ModelOutput):
    """What a forward pass returns: a dict (without what is None) in which DeepSpeed and Hugging Face find the tensors.

    Attributes:
        loss: lm_loss, or the loss of `targets`, + aux_loss_coefficient * moe_loss (scalar fp32); None without labels.
        lm_loss: mean cross entropy over the unmasked tokens, in nats (scalar fp32), or None without labels.
        moe_loss: sum of the MoE layers' load-balancing losses (scalar fp32).
        exp_counts: per MoE layer, [E] tokens per expert before drops.
        logits: [B, S, V], or None with labels.
        kl, match: of self-distillation (models/distillation.py), or None.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    moe_loss: Tensor = None  # type: ignore[assignment]  # always given; a ModelOutput wants defaults
    exp_counts: tuple[Tensor, ...] = None  # type: ignore[assignment]  # the same
    logits: Tensor | None = None
    kl: Tensor | None = None
    match: Tensor | None = None

    @property
    def task_loss(self) -> Tensor | None:
        """What the training loop reports: the loss without the balancing term."""
        return self.lm_loss


class GPT(nn.Module):
    """A decoder-only Transformer with torch's default initialisation, which differs between ranks. For weights that all
    ranks agree on, see models/initialization.py.

    Args:
        settings: shape and style.
        config: the "scmoe" section; its architecture, position and placement decide the pairs.
        sequence: tokens per sequence for the FLOPs behind the "auto" slot; default: the longest possible.
        group: the tensor-parallel ranks (scmoe_ds.parallel.tensor); None: every rank holds whole layers.
        recompute: what the backward pass computes again instead of keeping it, see models/recompute.py.

    Attributes:
        conversion: which MoE layers run as ScMoE and which as in the source; it has none unless the model is adapted.

    Raises:
        ScMoEConfigError: a depth that the placement does not divide, or a late join that the model cannot have.
        ValueError: sizes that the tensor-parallel ranks do not divide.
    """

    def __init__(
        self,
        settings: GPTSettings,
        config: ScMoEConfig,
        sequence: int | None = None,
        group: Group = None,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        config = config.over_tensor_parallel(size_of(group))
        config.check_model(settings.num_layers)
        _check_late_join(settings, config, recompute)
        divided = config.moe_ffn_hidden_size if config.expert_tensor_parallelism else None
        shared = config.moe_shared_expert_intermediate_size
        widths = {"--moe-ffn-hidden-size": divided, "--moe-shared-expert-intermediate-size": shared}
        _check_partition(settings, config)
        settings.check_tensor_parallel(size_of(group), widths)
        self.settings, self.config, self.group = settings, config, group
        self.sequence = sequence = sequence or settings.max_position_embeddings
        D, V = settings.hidden_size, settings.vocab_size
        self.embedding = vocabulary_embedding(V, D, group)
        learned = settings.position_embedding == "learned_absolute"
        self.positions = nn.Embedding(settings.max_position_embeddings, D) if learned else None
        pairs = make_pairs(settings, config, sequence, group, recompute)
        self.conversion = conversion_of(pairs)
        # The name that they have in checkpoints.
        self.runs = cast(Sequence[PlainPair | StagedPair], nn.ModuleList(pairs))
        self.final_norm = make_norm(settings)
        self.head = None if settings.tie_embeddings else column_parallel(D, [V], False, group)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        used_token: Tensor | None = None,
        targets: Targets | None = None,
        inputs_embeds: Tensor | None = None,
        **more: Tensor | None,
    ) -> GPTOutput:
        """
        Args:
            tokens: [B, S] int64.
            labels: [B, S] int64 next tokens; None returns logits.
            loss_mask: [B, S], 1 where a token counts in the language-model loss; default: everywhere.
            used_token: [B, S], 0 for padding, which stands on the right of each sequence: no token looks at it, and it
                goes to no routed expert. It counts neither in the balancing loss nor in an expert's capacity.
                `scmoe_ds.moe.gate.TOLERANT` marks a token that tolerates less precision. Default: there is neither.
            targets: what a teacher says of the same tokens; None: the text alone teaches.
            inputs_embeds: [B, S, D] in the place of the tokens' embeddings, before positions are added; as Hugging
                Face's.
            more: what `embedded` of a subclass takes, such as `images`.
        """
        hidden, used_token = self.embedded(tokens, used_token, inputs_embeds, **more)
        outputs = list(self._through_pairs(hidden, None, used_token))
        hidden, counts = outputs[-1].hidden, tuple(output.exp_counts for output in outputs)
        moe_loss = torch.stack([output.l_aux for output in outputs]).sum()
        logits_BSV = self._own_logits(hidden)
        if labels is None:
            logits = gather_vocabulary(logits_BSV, self.group)
            return GPTOutput(moe_loss=moe_loss, exp_counts=counts, logits=logits)

        def lm_loss() -> Tensor:
            return masked_mean(vocabulary_cross_entropy(logits_BSV, labels, self.group), loss_mask)

        parts = (targets or TEXT_ALONE).loss(logits_BSV, lm_loss, loss_mask, self.group)
        loss = parts.total + self.config.aux_loss_coefficient * moe_loss
        kl, match = (None if each is None else apart(each) for each in (parts.kl, parts.match))
        return GPTOutput(loss, apart(parts.lm), apart(moe_loss), counts, kl=kl, match=match)

    def hidden_states(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        used_token: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **more: Tensor | None,
    ) -> Tensor:
        """What `logits` reads of each token.

        Args:
            tokens: [B, S] int64.
            positions: [B, S] int64 place of each token in its sequence; None: from 0 in all of them.
            used_token, inputs_embeds, more: as in `forward`.

        Returns:
            [B, S, D].
        """
        hidden, used_token = self.embedded(tokens, used_token, inputs_embeds, **more)
        (last,) = deque(self._through_pairs(hidden, positions, used_token), maxlen=1)
        return last.hidden

    def embedded(
        self, tokens: Tensor, used_token: Tensor | None, inputs_embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] embeddings, before positions are added, and [B, S] `used_token` of the MoE layers. A subclass that
        reads more than text takes it here."""
        return self.embedding(tokens) if inputs_embeds is None else inputs_embeds, used_token

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] of `hidden_states` → [..., V], the whole vocabulary on every rank."""
        return gather_vocabulary(self._own_logits(hidden), self.group)

    def local_logits(self, tokens: Tensor, used_token: Tensor | None = None) -> Tensor:
        """[B, S] int64 → [B, S, V / ranks]: the logits of this rank's range of the vocabulary."""
        return self._own_logits(self.hidden_states(tokens, used_token=used_token))

    def _through_pairs(
        self, hidden: Tensor, positions: Tensor | None, used_token: Tensor | None
    ) -> Iterator[PairOutput]:
        if self.positions is not None:
            table = self.positions.weight
            hidden = hidden + (table[: hidden.shape[1]] if positions is None else table[positions])
        hidden = F.dropout(hidden, self.settings.hidden_dropout, self.training)
        late: list[Step] = []  # of the pair before
        for pair in self.runs:
            output: PairOutput = pair(hidden, used_token, *late)
            hidden, late = output.hidden, [] if output.late is None else [output.late]
            yield output._replace(late=None)  # whoever keeps it need not keep the routed tokens

    def _own_logits(self, hidden: Tensor) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        return vocabulary_logits(self.final_norm(hidden), weight, self.group)

    def moe_layers(self) -> list[MoE]:
        """The MoE layer behind each element of an output's `exp_counts`."""
        return [pair.last.moe for pair in self.runs]

    def scheduled_pairs(self) -> Sequence[StagedPair]:
        """The pairs that a schedule drives, as they run now; empty for the baselines."""
        return [pair.running for pair in self.runs if isinstance(pair, StagedPair)]


def _check_late_join(settings: GPTSettings, config: ScMoEConfig, recompute: Recompute | None) -> None:
    if config.join == "end":
        return
    if settings.norm_placement == "post":
        raise ScMoEConfigError(
            'scmoe.join = "late": with --norm-placement post a norm closes each block, and nothing can join its sum '
            "later; use pre, or set scmoe.join to end"
        )
    if recompute == "full":
        raise ScMoEConfigError(
            'scmoe.join = "late": --recompute-granularity full repeats one pair at a time, but a combine ends in the '
            "next one; use selective, or set scmoe.join to end"
        )


def _check_partition(settings: GPTSettings, config: ScMoEConfig) -> None:
    width, parts = config.moe_ffn_hidden_size or settings.ffn_hidden_size, config.expert_partition
    if width % parts:
        raise fail("scmoe.expert_partition", parts, f"must divide the {width} neurons of an expert; use another number")


def apart(part: Tensor) -> Tensor:
    """The same value as a tensor of its own, through which the loss's gradient does not pass.

    DeepSpeed divides the gradient of every tensor of an output by the accumulation steps when `backward` is called on a
    tensor itself. A part through which the loss's gradient passes would divide it again.
    """
    return part.view_as(part)
