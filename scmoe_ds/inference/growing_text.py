"""The text of a completion while its tokens come: which part is certain, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence

from scmoe_ds.data.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"


class GrowingText:
    """Decodes token by token.

    A character may be several tokens, and counts when all of them are there. Tokenizers decode the beginning of a text
    in another way (LLaMA's drops a space there): each token is decoded behind those before it, the first one behind
    the prompt. Only the tokens since the last whole character are decoded again.

    Args:
        tokenizer: of the model.
        prompt: its tokens.
        stops: texts that end the completion, wherever token borders are.

    Attributes:
        text: of the completion so far, up to the first stop text.
        stopped: whether there was one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens, self._begin = list(prompt), 0
        self._known, self._known_tokens = tokenizer.detokenize(prompt), len(prompt)
        self.text, self.stopped = "", False

    def add(self, token: int) -> None:
        """Takes the next token."""
        self._tokens.append(token)
        text = self._tokenizer.detokenize(self._tokens[self._begin :])
        if len(text) > len(self._known) and not text.endswith(_UNKNOWN):
            self._take(text[len(self._known) :])
            self._begin = self._known_tokens
            self._known_tokens = len(self._tokens)
            self._known = self._tokenizer.detokenize(self._tokens[self._begin :])

    def finish(self) -> None:
        """There are no more tokens: a character that is not whole shows as U+FFFD."""
        if not self.stopped:
            self._take(self._tokenizer.detokenize(self._tokens[self._begin :])[len(self._known) :])

    @property
    def settled(self) -> str:
        """The text without an end that may turn out to be the beginning of a stop text."""
        if self.stopped:
            return self.text
        held = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self.text)), 0, -1)
            if self.text.endswith(stop[:size])
        )
        return self.text[: len(self.text) - max(held, default=0)]

    def _take(self, new: str) -> None:
        before = max(len(self.text) - max(map(len, self._stops), default=0) + 1, 0)
        self.text += new
        found = [place for stop in self._stops if (place := self.text.find(stop, before)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
