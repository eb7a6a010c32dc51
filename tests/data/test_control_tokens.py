"""A text that spells a control token stays text, for every kind of tokenizer: ids of its characters, none of control."""

from __future__ import annotations

import json
import pickle
import string
from pathlib import Path
from typing import Any

import pytest

from scmoe_ds.data.tokenizer import HuggingFaceTokenizer
from scmoe_ds.errors import DataError

CHARACTERS = string.ascii_letters + string.digits + "<>/|_."
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = ["was <s>old</s> now", "</s>", "a</s></s>b <unk>", "<0x0A>", "x<0x41>y", "<extra>", "a <<s>> b"]


def fast(kind: str) -> Any:
    """A tokenizer whose words are the characters, a space, and the control tokens; "x y" is the only longer word."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL.values(), *BYTES, "▁", *CHARACTERS, "<extra>"]
    ids = {word: number for number, word in enumerate(words)}
    scores = [(word, 0.0 if len(word) > 1 else -3.0) for word in words]
    built = {
        "unigram": lambda: models.Unigram(scores, 0, byte_fallback=True),
        "bpe": lambda: models.BPE(ids, [], unk_token="<unk>", byte_fallback=True),
        "bpe that looks up words": lambda: models.BPE(ids, [], unk_token="<unk>", ignore_merges=True),
        "bpe with a merge of it": lambda: models.BPE(
            {**ids, "</": 900, "s>": 901}, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>", fuse_unk=True
        ),
        "wordpiece": lambda: models.WordPiece(
            {**ids, **{f"##{c}": 1000 + n for n, c in enumerate(CHARACTERS)}}, unk_token="<unk>"
        ),
        "words": lambda: models.WordLevel({**ids, "was": 900, "now": 901}, unk_token="<unk>"),
    }
    tokenizer = Tokenizer(built[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    if kind in ("wordpiece", "words"):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<extra>", special=True)])
    tokenizer.add_tokens([AddedToken("<|word|>", special=False)])
    return tokenizer


def save_fast(directory: Path, kind: str) -> HuggingFaceTokenizer:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=fast(kind), **SPECIAL).save_pretrained(str(directory))
    return HuggingFaceTokenizer(str(directory))


@pytest.mark.parametrize("kind", ["unigram", "bpe", "bpe that looks up words", "bpe with a merge of it"])
def test_fast_tokenizers_give_characters(kind: str, tmp_path: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(save_fast(tmp_path, kind)))  # as worker processes get it
    ids = tokenizer._tokenizer.get_vocab()
    for text in TEXTS:
        found = tokenizer.tokenize(text)
        pieces = [word for word in ids if len(word) == 1 or word in ("</", "s>")]
        assert {ids[piece] for piece in pieces} >= set(found), text
        assert tokenizer.detokenize(found) == text
        if "merge" not in kind:
            assert found == [ids["▁" if c == " " else c] for c in text]
    # An added token that is not special is a word; a byte token is for characters that have none.
    assert tokenizer.tokenize("a<|word|>b") == [ids["a"], ids["<|word|>"], ids["b"]]
    if kind in ("unigram", "bpe"):
        assert tokenizer.tokenize("é<0xC3>")[:3] == [ids["<0xC3>"], ids["<0xA9>"], ids["<"]]


@pytest.mark.parametrize("kind", ["wordpiece", "words"])
def test_tokenizers_of_words(kind: str, tmp_path: Path) -> None:
    tokenizer = save_fast(tmp_path, kind)
    control = {tokenizer._tokenizer.convert_tokens_to_ids(word) for word in ("<s>", "</s>", "<extra>", *BYTES)}
    for text in TEXTS:
        found = tokenizer.tokenize(text)
        assert found, text
        assert control.isdisjoint(found), text


def test_bytes_that_are_special_tokens(tmp_path: Path) -> None:
    """As in a tokenizer that was trained with its byte tokens among the special ones."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = fast("bpe")
    tokenizer.add_special_tokens(BYTES)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(str(tmp_path))
    loaded = HuggingFaceTokenizer(str(tmp_path))
    ids = loaded._tokenizer.get_vocab()
    assert loaded.tokenize("<0x41>é") == [*(ids[c] for c in "<0x41>"), ids["<0xC3>"], ids["<0xA9>"]]
    assert loaded.detokenize(loaded.tokenize("<0x41>é\n")) == "<0x41>é\n"


@pytest.fixture
def ctrl(tmp_path: Path) -> Any:
    """A slow tokenizer, by words, which knows "</s>" as a word of its vocabulary."""
    from transformers import AddedToken, CTRLTokenizer

    words = ["<unk>", "</s>", *(f"{c}@@" for c in CHARACTERS), *CHARACTERS]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="</s>")
    slow.add_tokens([AddedToken("<|word|>", special=False, normalized=False)])
    slow.save_pretrained(str(tmp_path / "ctrl"))
    return HuggingFaceTokenizer(str(tmp_path / "ctrl"))


def test_slow_tokenizers(ctrl: HuggingFaceTokenizer) -> None:
    ctrl = pickle.loads(pickle.dumps(ctrl))
    slow = ctrl._tokenizer
    assert not slow.is_fast
    for text in ("</s>", "a</s>b", "was <s>old</s> now", " </s> "):
        found = ctrl.tokenize(text)
        assert ctrl.eod not in found, text
        spelled = "".join(slow.convert_ids_to_tokens(found)).replace("@@", "")
        assert spelled == "".join(text.split()), text
    assert ctrl.tokenize("a<|word|>b") == slow.convert_tokens_to_ids(["a", "<|word|>", "b"])


def test_byt5(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=2).save_pretrained(str(tmp_path))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    for text in ("a</s>b", "<extra_id_0>é"):  # ids are bytes + 3
        assert tokenizer.tokenize(text) == [byte + 3 for byte in text.encode()]


def test_an_end_of_sequence_that_is_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=fast("bpe"), unk_token="<unk>", eos_token=".").save_pretrained(
        str(tmp_path)
    )
    words, unknown = tmp_path / "words", Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    PreTrainedTokenizerFast(tokenizer_object=unknown, unk_token="</s>", eos_token="</s>").save_pretrained(str(words))
    with pytest.raises(DataError, match=r"the end-of-sequence token '</s>'"):
        HuggingFaceTokenizer(str(words))
    with pytest.raises(DataError, match=r"ordinary text can become the end-of-sequence token '\.'"):
        HuggingFaceTokenizer(str(tmp_path))
