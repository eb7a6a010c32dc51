"""The next token from logits: greedy, temperature, top-k, top-p.

Every prompt draws from a generator of its own, seeded by (seed, prompt number): its text depends neither on the batch
that it sits in nor on the number of ranks.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scmoe_ds.moe.experts import to_device

_FLOAT = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: only the k most likely tokens; 0: all.
        top_p: only the most likely tokens that together have this probability; 1: all.
        seed: of the random numbers.

    Raises:
        ValueError: a value out of range, named by its flag.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        rules = {
            f"--temperature {self.temperature}: must be at least 0 (0 takes the most likely token)": (
                not 0 <= self.temperature < float("inf")
            ),
            f"--top-k {self.top_k}: must be at least 0 (0 allows all tokens)": self.top_k < 0,
            f"--top-p {self.top_p}: must be above 0 and at most 1": not 0 < self.top_p <= 1,
        }
        for rule, broken in rules.items():
            if broken:
                raise ValueError(rule)

    def generator(self, prompt: int) -> torch.Generator:
        """The random numbers of one prompt, on the host."""
        digest = hashlib.sha256(f"{self.seed} {prompt}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """[B] int64 next tokens.

    Args:
        logits_BV: any floating dtype.
        generators: of each row; each gives one number. Greedy choice leaves them alone.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(1)
    chances_BV, token_BV = allowed(logits_BV, sampling)
    # One number per row travels to the device, whatever the size of the vocabulary.
    drawn = torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in generators])
    reached_BV = chances_BV.double().cumsum(1)
    sought_B1 = to_device(drawn, logits_BV.device).unsqueeze(1) * reached_BV[:, -1:]
    place_B1 = torch.searchsorted(reached_BV, sought_B1, right=True)
    last_B1 = (chances_BV > 0).sum(1, keepdim=True) - 1  # rounding must not pick what is not allowed
    # None is allowed where logits are not finite, which is noticed later: when the tokens reach the host.
    return token_BV.gather(1, torch.minimum(place_B1, last_B1).clamp(min=0)).squeeze(1)


def allowed(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities in descending order, zero for what top-k and top-p rule out, and the tokens that they are of."""
    # Below the most likely one, so that no temperature makes an infinity of it.
    below_BV = logits_BV.float() - logits_BV.float().amax(1, keepdim=True)
    temperature = min(max(sampling.temperature, _FLOAT.tiny), _FLOAT.max)
    ordered_BV, token_BV = torch.sort(below_BV / temperature, dim=1, descending=True, stable=True)
    if sampling.top_k:
        ordered_BV[:, sampling.top_k :] = float("-inf")
    chances_BV = ordered_BV.softmax(1)
    if sampling.top_p < 1:
        before_BV = chances_BV.cumsum(1) - chances_BV
        # The token that reaches top_p is still in; the first one always is.
        before_BV[:, 0] = -1.0
        chances_BV = chances_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    return chances_BV, token_BV
