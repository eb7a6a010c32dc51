"""Texts that grow token by token, against the whole text: every prefix, every stop text, wherever token borders are."""

from __future__ import annotations

from typing import Any

import pytest

from scmoe_ds.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from scmoe_ds.inference.growing_text import GrowingText

PROMPT = "return é"
TEXT = " value 世界🙂 of\n  two é</s>  words\ufffd."


@pytest.fixture(scope="module", params=["bytes", "LLaMA", "bytes and merges"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """LLaMA's has words with a space in front, drops one in front of a text, and has byte tokens for 世, é and the like."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if request.param == "bytes":
        return ByteTokenizer()
    whole, special = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True)), ["<unk>", "<s>", "</s>"]
    if request.param == "LLaMA":
        whole.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
        whole.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [" value of two words return </s>\n  " * 9]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if request.param != "LLaMA" else []
    whole.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", eos_token="</s>").save_pretrained(directory)
    return HuggingFaceTokenizer(directory)


def grown(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> tuple[GrowingText, list[str], int]:
    """The text, what was settled after each token, and how many tokens were read."""
    prompt = tokenizer.tokenize(PROMPT)
    text, settled = GrowingText(tokenizer, prompt, stops), []
    for token in tokens:
        text.add(token)
        settled.append(text.settled)
        if text.stopped:
            break
    text.finish()
    return text, settled, len(settled)


def completion_of(tokenizer: Tokenizer) -> list[int]:
    prompt = tokenizer.tokenize(PROMPT)
    tokens = tokenizer.tokenize(PROMPT + TEXT)
    assert tokens[: len(prompt)] == prompt and tokenizer.detokenize(tokens) == PROMPT + TEXT
    return tokens[len(prompt) :]


def test_without_a_stop_text(tokenizer: Tokenizer) -> None:
    tokens = completion_of(tokenizer)
    text, settled, _ = grown(tokenizer, tokens, [])
    assert text.text == TEXT and not text.stopped
    for shown in settled:
        assert TEXT.startswith(shown)
    # Behind as few tokens as possible: after each token all characters that are whole, but for a U+FFFD at the end.
    for count, shown in enumerate(settled, start=1):
        whole = tokenizer.detokenize(tokenizer.tokenize(PROMPT) + tokens[:count])
        if not whole.endswith("\ufffd"):
            assert PROMPT + shown == whole


def test_every_stop_text(tokenizer: Tokenizer) -> None:
    tokens = completion_of(tokenizer)
    for begin in range(len(TEXT)):
        for end in range(begin + 1, min(begin + 7, len(TEXT)) + 1):
            stop = TEXT[begin:end]
            text, settled, read = grown(tokenizer, tokens, [stop, "never"])
            expected = TEXT[: TEXT.find(stop)]
            assert text.text == expected, stop
            assert all(expected.startswith(shown) for shown in settled), stop  # nothing of it was ever shown
            if not stop.endswith("\ufffd"):
                assert text.stopped
                before = tokenizer.detokenize(tokenizer.tokenize(PROMPT) + tokens[: read - 1])
                assert stop not in before[len(PROMPT) :], (
                    "it stops at the first token with which the stop text is whole"
                )


def test_several_stop_texts(tokenizer: Tokenizer) -> None:
    tokens = completion_of(tokenizer)
    for stops, expected in (
        (["two", "of"], " value 世界🙂 "),
        (["value 世界🙂 of!", "界🙂"], " value 世"),
        (["absent"], TEXT),
        (["世界", "alue 世界"], " v"),
    ):
        assert grown(tokenizer, tokens, stops)[0].text == expected


def test_what_may_become_a_stop_text_is_held_back() -> None:
    text = GrowingText(ByteTokenizer(), [65], ["\n\nQ", "ab"])
    shown = []
    for token in b"x\n\na\nb":
        text.add(token)
        shown.append(text.settled)
    assert shown == ["x", "x", "x", "x\n\n", "x\n\na", "x\n\na\nb"]
    text.finish()
    assert text.text == "x\n\na\nb"


def test_half_a_character_at_the_end() -> None:
    text = GrowingText(ByteTokenizer(), [65])
    for token in "é€".encode()[:4]:
        text.add(token)
    assert text.text == "é"
    text.finish()
    assert text.text == "é\ufffd"
