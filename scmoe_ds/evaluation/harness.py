"""A trained GPT as a model of EleutherAI's lm_eval. Importing this module needs that package.

lm_eval sees a single process on every rank. This module divides requests over the data-parallel ranks, so that
expert-parallel ranks make every step together. Every rank gets all results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from scmoe_ds.data.tokenizer import Tokenizer
from scmoe_ds.errors import EvaluationError
from scmoe_ds.evaluation.scoring import Scorer
from scmoe_ds.evaluation.windows import Row, SlidingWindow, row_of
from scmoe_ds.inference.generate import Request, TextGenerator
from scmoe_ds.inference.sampling import Sampling
from scmoe_ds.parallel.agreement import fingerprint, require_agreement

_DEFAULT_NEW_TOKENS = 256  # lm_eval's own


@register_model("scmoe")
class ScMoELM(TemplateLM):
    """Answers lm_eval's three kinds of requests.

    Args:
        scorer: computes log likelihoods.
        tokenizer: of the model; an empty context becomes its end-of-document token.
        rule: windows of rolling log likelihoods; its seq_length also limits questions. Prompts and generated tokens
            together may fill the model's whole context.

    Attributes:
        truncated: requests so far whose context was longer and lost its left end.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, rule: SlidingWindow) -> None:
        super().__init__()
        self._scorer, self._text, self._rule = scorer, tokenizer, rule
        self._generator = TextGenerator(scorer.model, scorer.calibrators, scorer.batch_size, tokenizer)
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._text.eod

    @property
    def max_length(self) -> int:
        """The limit of tokens that the model reads."""
        return self._rule.seq_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        try:
            string.encode("utf-8")
        except UnicodeEncodeError as error:
            around = string[max(error.start - 30, 0) : error.start]
            what = f"--tasks: a text has half of a surrogate pair, which is no character, behind {around!r}"
            raise EvaluationError(f"{what}: repair it in the task's data") from None
        return self._text.tokenize(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """(log likelihood in nats, whether greedy decoding gives it) of each continuation after its context. Raises an
        EvaluationError if a continuation is longer than the model's context."""
        _check_same_requests(requests)
        rows = []
        for (_, text), context, continuation in requests:
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"--tasks: a continuation has {len(continuation)} tokens, but windows have {self.max_length}: "
                    f"leave it out of the task ({text[:60]!r}…)"
                )
            whole = np.array([*context, *continuation][-(self.max_length + 1) :], dtype=np.int64)
            self.truncated += len(whole) < len(context) + len(continuation)
            rows.append(Row(whole[:-1], whole[len(whole) - len(continuation) :]))
        sums = self._scorer.score_all(rows).tolist()
        return [(-nats, greedy == len(row.labels)) for (nats, greedy), row in zip(sums, rows, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood in nats of each whole text, as `scmoe_ds.evaluation.perplexity` computes it."""
        texts = [self.tok_encode(request.args[0]) for request in requests]
        _check_same_requests(texts)
        places = [(number, window) for number, text in enumerate(texts) for window in self._rule.windows(len(text))]
        nats = self._scorer.score_all([row_of(texts[number], window, self.eot_token_id) for number, window in places])
        totals = [0.0] * len(texts)
        for (number, _), window_nats in zip(places, nats[:, 0].tolist(), strict=True):
            totals[number] -= window_nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The generated text after each context, up to the first stop text, which is left out. Raises an
        EvaluationError if sampling settings are out of range, or the new tokens have no room."""
        _check_same_requests([request.args for request in requests])
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers = [""] * len(requests)
        for settings, numbers in groups.items():
            texts = self._generate([requests[number].args[0] for number in numbers], json.loads(settings))
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        request = self._request(settings, stops)
        room = self._generator.context - request.max_new_tokens
        prompts = []
        for context in contexts:
            prompt = self.tok_encode(context) or [self.eot_token_id]
            self.truncated += len(prompt) > room
            prompts.append(prompt[-room:])
        return [completion.text for completion in self._generator.generate(prompts, request)]

    def _request(self, settings: dict[str, Any], stops: Sequence[str]) -> Request:
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = int(next((settings[name] for name in names if settings.get(name)), _DEFAULT_NEW_TOKENS))
        if most >= self._generator.context:
            raise EvaluationError(
                f"--tasks: {most} new tokens are asked for, but the model's context is {self._generator.context}: set "
                "a smaller max_gen_toks in the task's generation_kwargs"
            )
        do_sample = settings.get("do_sample")
        temperature = float(settings.get("temperature", 1.0 if do_sample else 0.0))
        if do_sample is False:  # it overrides any temperature, as in lm_eval's own models
            temperature = 0.0
        try:
            sampling = Sampling(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))
        except ValueError as error:
            raise EvaluationError(f"--tasks: generation_kwargs: {error}") from None
        return Request(most, sampling, (self.eot_token_id,), tuple(stops), self._text.vocab_size)


def _check_same_requests(requests: Any) -> None:
    require_agreement("the requests of the tasks", fingerprint(requests))
