"""Text is text: a text that spells a control token, such as "</s>", is encoded as the characters that it consists of.

A tokenizer of transformers has three ways to a control token. Its added tokens are cut out of the text first; they are
switched off here. Its model may find the spelling in its vocabulary, or a byte token ("<0x0A>") that is meant for
characters without a token of their own; the spelling is cut in two in front of the model. Added tokens that are not
special are ordinary words of the vocabulary and stay whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

Encode = Callable[[str], list[int]]


def plain_encoder(tokenizer: Any) -> Encode:
    """The function from a text to its ids, with no special token added around it.

    Args:
        tokenizer: of transformers, backed by `tokenizers` ("fast") or by Python ("slow").
    """
    added = tokenizer.added_tokens_decoder.values()
    control = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    if tokenizer.is_fast:
        return _fast_encoder(tokenizer.backend_tokenizer.to_str(), control)
    return _slow_encoder(tokenizer, control)


def _fast_encoder(saved: str, control: set[str]) -> Encode:
    from tokenizers import Regex, Tokenizer
    from tokenizers.pre_tokenizers import Sequence, Split

    encoder = Tokenizer.from_str(saved)  # a copy: the tokenizer itself stays as its files have it
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    reachable = _reachable(json.loads(saved), control)
    if reachable:
        cut = Split(Regex(_first_characters(reachable)), "merged_with_previous")
        encoder.pre_tokenizer = cut if encoder.pre_tokenizer is None else Sequence([encoder.pre_tokenizer, cut])

    def encode(text: str) -> list[int]:
        return list(encoder.encode(text, add_special_tokens=False).ids)

    return encode


def _reachable(saved: dict[str, Any], control: set[str]) -> set[str]:
    """Of the control tokens and byte tokens, those that the model itself could find in a text."""
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


def _slow_encoder(tokenizer: Any, control: set[str]) -> Encode:
    if hasattr(tokenizer, "tokens_trie"):
        ordinary = type(tokenizer.tokens_trie)()
        for token in tokenizer.added_tokens_decoder.values():
            if not token.special and token.content not in control:
                ordinary.add(token.content)
        tokenizer.tokens_trie = ordinary
    forbidden = set(tokenizer.convert_tokens_to_ids(sorted(control))) - {tokenizer.unk_token_id}
    spelled = re.compile(_first_characters(word for word in control if len(word) > 1) or "(?!)")

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if forbidden.isdisjoint(ids):
            return list(ids)
        # Some tokenizers look for control tokens by themselves, as a whole text or a whole word.
        places = [0, *(match.end() for match in spelled.finditer(text)), len(text)]
        pieces = [text[begin:end] for begin, end in pairwise(places) if begin < end]
        return [token for piece in pieces
                for token in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]]  # fmt: skip

    return encode
