"""Questions about handwritten digits: some images, then a question and its answer in bytes.

    [patches of 3] [patches of 7] [patches of 1] … read? 371….
    [patches of 3] [patches of 7] [patches of 1] … back? ….173.

Most tokens of a sequence are patches, as in the prompts of a vision-language model. The digits are scikit-learn's;
held-out questions are about images that no question of the training set has.

Shape suffixes: N images of a question, C channels, H height, W width, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scmoe_ds.data.images import Digits, shuffled
from scmoe_ds.data.tokenizer import ByteTokenizer

KINDS = {"read": 1, "back": -1}
"""A question, and the step between the digits that answer it."""
PATCH_TOKEN = ByteTokenizer().vocab_size
VOCAB_SIZE = PATCH_TOKEN + 1
IMAGE_SIZE = 8
HELD_OUT = 360
"""Of the 1797 images."""


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        prompt: token ids, patch tokens first.
        answer: token ids.
        images: [N, 1, H, W] float32 in -1 … 1.
    """

    prompt: list[int]
    answer: list[int]
    images: Tensor

    @property
    def text(self) -> str:
        """Of the answer."""
        return ByteTokenizer().detokenize(self.answer)


class DigitQuestions(Dataset[dict[str, Tensor]]):
    """By number from 0: {"tokens" int64 [S], "labels" int64 [S], "loss_mask" float32 [S], "images" [N, 1, H, W]}. The
    loss counts the answer alone. A number and the seed decide a question.

    Args:
        count: questions.
        patches: of an image.
        seed: of the split and of the questions.
        held_out: ask about the images that training does not see.
        images: of a question.

    Raises:
        MissingPackageError: scikit-learn is missing.
    """

    def __init__(self, count: int, patches: int, seed: int = 1, held_out: bool = False, images: int = 12) -> None:
        self.count, self.patches, self.seed, self.held_out, self.number = count, patches, seed, held_out, images
        self._digits = Digits(IMAGE_SIZE)
        order = shuffled(len(self._digits), seed, 0)
        self._pool = order[:HELD_OUT] if held_out else order[HELD_OUT:]

    def __len__(self) -> int:
        return self.count

    def question(self, index: int) -> Question:
        """Images, question and answer."""
        random = np.random.default_rng((self.seed, int(self.held_out), index))
        chosen = [self._pool[place] for place in random.integers(len(self._pool), size=self.number)]
        kind = list(KINDS)[random.integers(len(KINDS))]
        digits = self._digits.labels[chosen].tolist()
        to_tokens = ByteTokenizer().tokenize
        prompt = [PATCH_TOKEN] * (self.number * self.patches) + to_tokens(f"{kind}? ")
        answer = to_tokens(f"{''.join(map(str, digits[:: KINDS[kind]]))}.")
        return Question(prompt, answer, self._digits.images[chosen])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        question = self.question(index)
        whole = torch.tensor(question.prompt + question.answer)
        loss_mask = torch.zeros(len(whole) - 1)
        loss_mask[len(question.prompt) - 1 :] = 1
        return {"tokens": whole[:-1], "labels": whole[1:], "loss_mask": loss_mask, "images": question.images}

    @property
    def length(self) -> int:
        """S."""
        return len(self[0]["tokens"])
