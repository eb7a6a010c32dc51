"""Encodes a text that spells a control token, such as "</s>", as ordinary characters.

A tokenizer of transformers can turn text into a control token in three ways. First it cuts its added tokens out of the
text; here this is switched off. Then its model may find the spelling in its vocabulary, or may find a byte token
("<0x0A>"), which stands for characters without a token. Here the spelling is cut in two before the model sees it.
Added tokens that are not special are ordinary words and stay whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

Encode = Callable[[str], list[int]]


def plain_encoder(tokenizer: Any) -> Encode:
    """The function from a text to its ids, without special tokens around it. It can be pickled.

    Args:
        tokenizer: of transformers, backed by `tokenizers` ("fast") or by Python ("slow").
    """
    added = tokenizer.added_tokens_decoder.values()
    control = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    return (_FastEncoder if tokenizer.is_fast else _SlowEncoder)(tokenizer, control)


class _FastEncoder:
    def __init__(self, tokenizer: Any, control: set[str]) -> None:
        from tokenizers import Regex, Tokenizer
        from tokenizers.pre_tokenizers import Sequence, Split

        saved = tokenizer.backend_tokenizer.to_str()
        encoder = Tokenizer.from_str(saved)  # a copy: the tokenizer itself stays as its files have it
        encoder.no_truncation()
        encoder.no_padding()
        reachable = _reachable(json.loads(saved), control)
        if reachable:
            cut = Split(Regex(_first_characters(reachable)), "merged_with_previous")
            encoder.pre_tokenizer = cut if encoder.pre_tokenizer is None else Sequence([encoder.pre_tokenizer, cut])
        self._encoder = encoder

    def __call__(self, text: str) -> list[int]:
        self._encoder.encode_special_tokens = True  # pickling forgets it
        return list(self._encoder.encode(text, add_special_tokens=False).ids)


def _reachable(saved: dict[str, Any], control: set[str]) -> set[str]:
    """The control tokens and byte tokens that the model itself could find in a text."""
    model = saved["model"]
    vocabulary = model["vocab"]
    words = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    spelled = set(control)
    if model.get("byte_fallback") or "ByteFallback" in json.dumps(saved["decoder"]):
        spelled |= {f"<0x{byte:02X}>" for byte in range(256)}
    found = spelled & words
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
        found &= {"".join(merge) for merge in merges}
    return {word for word in found if len(word) > 1}


def _first_characters(words: Iterable[str]) -> str:
    """A pattern of the first character of each occurrence of a word."""
    rests: dict[str, list[str]] = {}
    for word in sorted(words):
        rests.setdefault(word[0], []).append(re.escape(word[1:]))
    return "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())


class _SlowEncoder:
    def __init__(self, tokenizer: Any, control: set[str]) -> None:
        self._tokenizer = tokenizer
        if hasattr(tokenizer, "tokens_trie"):
            ordinary = type(tokenizer.tokens_trie)()
            for token in tokenizer.added_tokens_decoder.values():
                if not token.special and token.content not in control:
                    ordinary.add(token.content)
            tokenizer.tokens_trie = ordinary
        self._forbidden = set(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
        self._spelled = re.compile(_first_characters(word for word in control if len(word) > 1) or "(?!)")

    def __call__(self, text: str) -> list[int]:
        ids = self._ids(text)
        if self._forbidden.isdisjoint(ids):
            return ids
        # Some tokenizers look for control tokens themselves, as a whole text or a whole word.
        places = [0, *(match.end() for match in self._spelled.finditer(text)), len(text)]
        return [token for begin, end in pairwise(places) if begin < end for token in self._ids(text[begin:end])]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
