"""Generation: prompts in batches, a prefill pass for each, then one token per step for all rows together.

On several ranks each data-parallel rank has its share of the prompts, and all take their steps together: an
expert-parallel rank serves tokens of the others even when its own texts have ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import GenerationError
from scmoe_ds.inference.growing_text import GrowingText
from scmoe_ds.inference.passes import Passes
from scmoe_ds.inference.sampling import Sampling, choose
from scmoe_ds.models.gpt import GPT
from scmoe_ds.parallel.agreement import gather
from scmoe_ds.parallel.tensor import (
    data_parallel_rank,
    data_parallel_size,
    tensor_parallel_group,
    tensor_parallel_rank,
    tensor_parallel_size,
)
from scmoe_ds.planner.calibrator import Calibrator
from scmoe_ds.planner.simulation import Mode


@dataclass(frozen=True)
class Request:
    """What to generate for every prompt.

    Attributes:
        max_new_tokens: most tokens of a completion.
        sampling: how they are chosen.
        end: each of these tokens ends a completion; it is the last token and has no text.
        stop: each of these texts ends a completion, wherever token borders are. They need a tokenizer.
        vocab_size: tokens of the tokenizer; the padding of the vocabulary behind them is never chosen. None: all.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    vocab_size: int | None = None


@dataclass
class Completion:
    """What followed a prompt.

    Attributes:
        prompt: its number.
        tokens: the new ones, the tokens of the stop text included.
        text: their text up to the stop text; "" without a tokenizer. Before the end, only what no later token changes.
        ended: "stop", "length" (max_new_tokens), "context" (no further position), or None while it goes on.
    """

    prompt: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    ended: Literal["stop", "length", "context"] | None = None


OnToken = Callable[[Completion], None]


@dataclass
class GenerationTimes:
    """Seconds and tokens of this rank, prefill and decode apart; padding is not counted."""

    prefill_s: float = 0.0
    prefill_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0


class TextGenerator:
    """Completes prompts with a model of `scmoe_ds.inference.model.load_model`.

    Args:
        model: this rank's part.
        calibrators: of "prefill" and "decode"; none: the model's own schedules for both.
        batch_size: prompts that this rank completes together.
        tokenizer: for the texts of completions; None: tokens alone.
        trace: which forward pass is recorded, from 1: a prefill, the tokens of its batch, the next prefill; None: none.
        trace_dir: where its timeline is written.

    Attributes:
        times: of everything that was generated so far.
        passes: the model's forward passes.
    """

    def __init__(
        self,
        model: GPT,
        calibrators: Mapping[Mode, Calibrator] | None = None,
        batch_size: int = 8,
        tokenizer: Tokenizer | None = None,
        trace: int | None = None,
        trace_dir: str = "traces",
    ) -> None:
        self.model, self.batch_size, self.tokenizer = model, batch_size, tokenizer
        self.passes, self.times = Passes(model, calibrators or {}, trace, trace_dir), GenerationTimes()
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._data_rank, self._data_ranks = (data_parallel_rank(), data_parallel_size()) if self._ranks > 1 else (0, 1)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        request: Request,
        on_token: OnToken | None = None,
        images: Sequence[Tensor] | None = None,
    ) -> list[Completion]:
        """Completions of all prompts, in their order. Collective: every rank has the same prompts.

        Args:
            prompts: token ids, at least one each.
            request: what to generate for each.
            on_token: is called with the completion after each of its tokens, on the ranks that complete it.
            images: [N, C, H, W] of each prompt, for a VisionLanguageGPT; None: prompts are text alone.

        Raises:
            GenerationError: an empty prompt, a token that is not in the vocabulary, or one as long as the context;
                logits that are not finite.
        """
        assert self.tokenizer is not None or not request.stop
        self._check(prompts)
        share = range(len(prompts))[self._data_rank :: self._data_ranks]
        most = -(-len(prompts) // self._data_ranks)  # of any rank: all make as many batches
        done: list[Completion] = []
        for first in range(0, most, self.batch_size):
            numbers = share[first : first + self.batch_size]
            seen = torch.cat([images[number] for number in numbers]) if images and numbers else None
            done += self._complete([(number, prompts[number]) for number in numbers], request, on_token, seen)
        if self._data_ranks > 1:
            done = _from_all_ranks(done)
        return sorted(done, key=lambda completion: completion.prompt)

    def _complete(
        self,
        batch: Sequence[tuple[int, Sequence[int]]],
        request: Request,
        on_token: OnToken | None,
        images: Tensor | None,
    ) -> list[Completion]:
        completions = [Completion(number) for number, _ in batch]
        tokenizer = self.tokenizer
        texts = [GrowingText(tokenizer, prompt, request.stop) for _, prompt in batch] if tokenizer else []
        prompts = [prompt for _, prompt in batch] or [[0]]  # a rank without prompts still serves the others
        generators = [request.sampling.generator(number) for number, _ in batch] or [torch.Generator()]
        longest = max(map(len, prompts))
        cache = self.passes.cache_for(len(prompts), min(longest + request.max_new_tokens, self.context))
        cache.begin(len(prompts))
        times, started = self.times, time.perf_counter()
        with cache.attached():
            logits_BV = self.passes.prefill(prompts, cache, not batch, images)
            while True:
                tokens_B = self._agreed(choose(logits_BV[:, : request.vocab_size], request.sampling, generators))
                tokens = _to_host(tokens_B, logits_BV)
                added = self._note(tokens, prompts, completions, texts, request, on_token)
                now = time.perf_counter()
                if cache.grown:
                    times.decode_s, times.decode_steps = times.decode_s + now - started, times.decode_steps + 1
                    times.decode_tokens += added
                else:
                    times.prefill_s += now - started
                    times.prefill_tokens += sum(map(len, prompts)) if batch else 0
                started = now
                if not self._any(any(completion.ended is None for completion in completions)):
                    return completions
                goes_on = [completion.ended is None for completion in completions] or [False]
                logits_BV = self.passes.decode(tokens_B, cache, goes_on)

    def _note(
        self,
        tokens: Sequence[int],
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        texts: Sequence[GrowingText],
        request: Request,
        on_token: OnToken | None,
    ) -> int:
        """Adds a token to each completion that goes on; returns to how many."""
        added = 0
        for row, (completion, prompt, token) in enumerate(zip(completions, prompts, tokens, strict=False)):
            if completion.ended is not None:
                continue
            added += 1
            completion.tokens.append(token)
            text = texts[row] if texts else None
            if text is not None and token not in request.end:
                text.add(token)
            completion.ended = _ending(completion.tokens, text, request, self.context - len(prompt))
            if text is not None:
                if completion.ended is not None:
                    text.finish()
                completion.text = text.settled if completion.ended is None else text.text
            if on_token is not None:
                on_token(completion)
        return added

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion together."""
        return self.model.settings.max_position_embeddings

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts, start=1):
            if not prompt:
                raise GenerationError(f"prompt {number} is empty; give at least one token to go on from")
            if len(prompt) >= self.context:
                raise GenerationError(
                    f"prompt {number} has {len(prompt)} tokens, but the model's context is "
                    f"{self.context}: shorten it to at most {self.context - 1}"
                )
            if not 0 <= min(prompt) <= max(prompt) < self.model.settings.vocab_size:
                raise GenerationError(
                    f"prompt {number} has a token outside of the model's vocabulary of "
                    f"{self.model.settings.vocab_size}: is this its tokenizer?"
                )

    def _agreed(self, tokens_B: Tensor) -> Tensor:
        """The first tensor-parallel rank's choice: a last bit must not send the others along another text."""
        if self._ranks > 1 and tensor_parallel_size() > 1:
            dist.broadcast(tokens_B, dist.get_rank() - tensor_parallel_rank(), group=tensor_parallel_group())
        return tokens_B

    def _any(self, value: bool) -> bool:
        """Whether it is true on any rank."""
        if self._ranks == 1:
            return value
        flag = torch.full((), int(value), device=self.passes.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _to_host(tokens_B: Tensor, logits_BV: Tensor) -> list[int]:
    """The tokens. On a GPU the host waits here, once per token, for these and for whether all logits are finite.

    Raises:
        GenerationError: not all are finite.
    """
    *tokens, finite = torch.cat([tokens_B, logits_BV.isfinite().all().view(1)]).tolist()
    if not finite:
        raise GenerationError(
            "the logits are not finite: the weights of --load are not, or --dtype cannot hold what the model computes; "
            "generate with --dtype fp32, or from another checkpoint"
        )
    return tokens


def _ending(
    tokens: list[int], text: GrowingText | None, request: Request, room: int
) -> Literal["stop", "length", "context"] | None:
    if tokens[-1] in request.end or (text is not None and text.stopped):
        return "stop"
    if len(tokens) >= request.max_new_tokens:
        return "length"
    return "context" if len(tokens) >= room else None


def _from_all_ranks(own: list[Completion]) -> list[Completion]:
    # Tensor-parallel ranks have the same completions.
    by_prompt = {completion.prompt: completion for part in gather(own) for completion in part}
    return list(by_prompt.values())
