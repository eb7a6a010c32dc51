"""How well a vision-language model answers questions about images.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from scmoe_ds.parallel.process import device


class Answers(NamedTuple):
    """
    Attributes:
        loss: nats per token of the answers.
        right_tokens: share of the answers' tokens that are the likeliest ones.
        right: share of the answers of which all tokens are: greedy generation gives exactly these.
        questions: how many.
    """

    loss: float
    right_tokens: float
    right: float
    questions: int


@torch.inference_mode()
def score_answers(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Answers:
    """Loss and accuracy over all data-parallel ranks. Collective: all ranks have as many batches.

    Args:
        model: in evaluation mode; a VisionLanguageGPT or an engine that has one.
        batches: this rank's, of `scmoe_ds.data.digit_questions`, stacked; the mask says what an answer is.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device())  # nats, tokens, right ones, right answers, questions
    for batch in batches:
        tokens, labels, loss_mask, images = (
            batch[name].to(device()) for name in ("tokens", "labels", "loss_mask", "images")
        )
        logits_BSV = model(tokens, images=images).logits.float()
        nats_BS = F.cross_entropy(logits_BSV.transpose(1, 2), labels, reduction="none") * loss_mask
        counts_BS = loss_mask != 0
        right_BS = (logits_BSV.argmax(-1) == labels) | ~counts_BS
        numbers = [nats_BS.sum(), counts_BS.sum(), (right_BS & counts_BS).sum(), right_BS.all(1).sum()]
        sums += torch.stack([*(each.double() for each in numbers), sums.new_tensor(len(tokens))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, counted, right_tokens, right, questions = sums.tolist()
    return Answers(nats / counted, right_tokens / counted, right / questions, int(questions))
